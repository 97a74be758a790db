"""The study's verdicts: sentences made of the numbers, never typed. Each question has one function, a list of lines.

"not run" stands where cells are missing, "preliminary" under five paired seeds, and the lost runs beside every mean.
"""

import math
from collections.abc import Sequence

from revival import words
from revival.cases import (
    CASES,
    about,
    absent,
    decayed,
    lost_of,
    next_rates,
    not_paired,
    not_there,
    points,
    preliminary,
    quarters,
    shares,
    splits,
    spread,
    tokens_of,
    unsettled,
    warm_up,
)
from revival.cells import PUBLISHED_STEPS, PUBLISHED_WARMUP
from revival.records import Record
from revival.statistics import Difference, paired
from revival.verdicts_inside import collapse, slopes, wasted
from revival.verdicts_scale import deviations, scale
from revival.view import FOUR, NEAR, View, overload

# ln of the published perplexities on CodeParrot, after 2.1 billion tokens, one seed each: ReLU minus GELU, nats.
PUBLISHED_GAP = {
    "Pythia-70M, T = 128": {"none": math.log(3.736 / 4.086), "norms": math.log(3.590 / 3.512)},
    "GPT-2 124M, T = 128": {"none": math.log(2.936 / 3.197), "norms": math.log(2.757 / 2.688)},
    "Pythia-70M, T = 256": {"none": math.log(3.273 / 3.570), "norms": math.log(3.107 / 3.054)},
}
# Percent of heads at or above three quarters of the ceiling, GPT-2 124M after 2.1 billion tokens, one seed.
PUBLISHED_OVERLOAD = {"ln+gelu": 8, "ln+relu": 3, "gelu": 58, "relu": 23}
AGAINST = "**This contradicts the paper**"
AGAINST_TUNED = (
    "**At rates tuned for each arm this contradicts the paper**, which tuned none and warmed up for "
    f"{PUBLISHED_WARMUP:,} steps"
)
PAIRS = (
    ("Without block norms", "none", "relu", "gelu"),
    ("With LayerNorm", "norms", "ln+relu", "ln+gelu"),
)  # in words, in PUBLISHED_GAP, and the two arms


def order(view: View) -> list[str]:
    """Does ReLU beat GELU without norms, by how much, at tuned rates; does the order flip with norms?"""
    lines = []
    for rung, prefix, published in CASES:
        if not {prefix + arm for arm in FOUR} & set(view.arms(rung)):
            lines.append(f"{about(rung, prefix)}: not run.")
            continue
        for name, norm, one, other in PAIRS:
            head = f"{name} ({about(rung, prefix)})"
            arms = {"ReLU": (rung, prefix + one), "GELU": (rung, prefix + other)}
            if missing := not_there(view, **arms):
                lines.append(f"{head}: {missing}.")
                continue
            gap = PUBLISHED_GAP[published][norm]
            chosen_on = {
                act: ("A" if rung == "G" else arm[0], arm[1].removeprefix("t256:")) for act, arm in arms.items()
            }
            pair = view.own(*arms["ReLU"]), view.own(*arms["GELU"])
            more = unsettled(view, **chosen_on) + spread(view, **arms) + next_rates(view, **arms)
            line = _order(view, head, *pair, gap, more)
            lines.append(line + ("" if prefix else _at_common(view, rung, one, other, gap)))
        lines += _flip(view, rung, prefix, PUBLISHED_GAP[published])
    return lines


def _order(
    view: View, head: str, ours: Sequence[Record], theirs: Sequence[Record], published: float, more: str = ""
) -> str:
    gap = view.gap(ours, theirs)
    gone = lost_of(ReLU=ours, GELU=theirs) + not_paired(ours, theirs) + more
    if gap is None:
        return f"{head}, {tokens_of(ours)}: no seed of which both arms survived and compare; {gone}."
    who = {-1: "ReLU beats GELU", 1: "GELU beats ReLU", 0: _undecided(gap)}[gap.sign]
    rates = f"rates {words.rate_name(ours[0]['lr'])} and {words.rate_name(theirs[0]['lr'])}"
    agreement = _tuned(view, ours, _agreement(gap.sign, -1 if published < 0 else 1))
    return (
        f"{preliminary(gap)}{head}, {tokens_of(ours)}: {who}: {splits(view, ours, theirs)}; "
        f"{quarters(view, ours, theirs)}; {rates}{warm_up(ours)}; {gone}. Published{decayed(ours)}: "
        f"{words.signed(published, 3)}{agreement}."
    )


def _undecided(gap: Difference) -> str:
    if gap.single:
        return f"{'ReLU' if gap.mean < 0 else 'GELU'} is ahead in the one seed that there is"
    return "ReLU and GELU are not told apart"


def _at_common(view: View, rung: str, one: str, other: str, published: float) -> str:
    """The same pair at the common rate, where that is not both arms' own; a sentence for the end of a line."""
    common = view.common_rate(rung)
    if common is None or {view.own_rate(rung, one), view.own_rate(rung, other)} == {common}:
        return ""
    ours, theirs = view.reported(rung, one, common), view.reported(rung, other, common)
    if not (ours and theirs):
        return ""
    gap, gone = view.gap(ours, theirs), lost_of(ReLU=ours, GELU=theirs) + not_paired(ours, theirs)
    head = f"{preliminary(gap)}At the common rate, {words.rate_name(common)}"
    if gap is None:
        return f" {head}: no seed of which both arms survived and compare; {gone}."
    agrees = gap.sign == (-1 if published < 0 else 1)
    told = words.untold(gap) if gap.sign == 0 else "as published" if agrees else "**against the paper**"
    return f" {head}: {words.interval(gap)}, {told}; {gone}."


def _agreement(sign: int, published: int) -> str:
    """For the end of a sentence: what a sign (0: not told apart) says of the published one."""
    if sign == 0:
        return ", which these runs neither show nor contradict"
    return ", the same direction" if sign == published else f". {AGAINST}"


def _tuned(view: View, runs: Sequence[Record], agreement: str) -> str:
    """The papers had one rate: what contradicts them at rates of each arm's own says so."""
    tuned = view.tuning(runs[0]["rung"], runs[0]["arm"])
    return agreement.replace(AGAINST, AGAINST_TUNED) if tuned else agreement


def _as_published(sign: int, published: int) -> str:
    """The same where what is published is not in the sentence."""
    return ", as in the paper" if sign == published else f". {AGAINST}"


def _gap_as_published(gap: Difference, published: int) -> str:
    return _as_published(gap.sign, published) if gap.sign else f" ({words.untold(gap)})"


def _flip(view: View, rung: str, prefix: str, published: dict[str, float]) -> list[str]:
    """Whether norms turn the order round: the difference of the two differences, seed by seed."""
    head = f"Whether norms turn the order round ({about(rung, prefix)})"
    if missing := not_there(view, **{words.arm_words(arm): (rung, prefix + arm) for arm in FOUR}):
        return [f"{head}: {missing}."]
    arms = {arm: view.own(rung, prefix + arm) for arm in FOUR}
    by = published["none"] - published["norms"]
    turned = _turned(view, arms, by)
    if turned is None:
        return [f"{head}: no seed of which all four arms survived and compare; {_gone(arms)}."]
    verdict, change, sign = turned
    line = (
        f"{verdict} ({about(rung, prefix)}), {tokens_of(arms['relu'])}: {change}; {_gone(arms)}. Published: they do"
        f"{_tuned(view, arms['relu'], _agreement(sign, -1))}."
    )
    common = None if prefix else view.common_rate(rung)
    at_common = {} if common is None else {arm: view.reported(rung, arm, common) for arm in FOUR}
    if common is None or not all(at_common.values()) or at_common == arms:
        return [line]
    head = f"At the common rate, {words.rate_name(common)}"
    turned = _turned(view, at_common, by)
    if turned is None:
        return [f"{line} {head}: no seed of which all four arms survived and compare; {_gone(at_common)}."]
    verdict, change, sign = turned
    agrees = _as_published(sign, -1) if sign else ""
    return [f"{line} {head}: {verdict[0].lower()}{verdict[1:]}{agrees}: {change}; {_gone(at_common)}."]


def _turned(view: View, arms: dict[str, list[Record]], published: float) -> tuple[str, str, int] | None:
    """Whether norms turn the order round, how ReLU - GELU changes where they are taken out, and a sign: -1 where the
    order turns as published, 1 where it does not or turns the other way, 0 where that is not shown. None: no seed.
    """
    free, normed = view.gap(arms["relu"], arms["gelu"]), view.gap(arms["ln+relu"], arms["ln+gelu"])
    change = paired(free.points, normed.points) if free and normed else None
    if free is None or normed is None or change is None:
        return None
    told = {-1: "with the published sign", 1: "against the published sign", 0: f"{words.untold(change)}; published"}
    text = (
        f"taking them out changes ReLU {words.MINUS} GELU by {words.interval(change)} nats, {told[change.sign]} "
        f"({words.signed(published, 3)})"
    )
    verdict, sign = _flipped(free.sign, normed.sign)
    return f"{preliminary(free, normed, change)}{verdict}", text, sign


def _flipped(free: int, normed: int) -> tuple[str, int]:
    """From the signs of ReLU - GELU without and with norms: a verdict, and -1 where that is as published, 1 where it is
    against that, 0 where neither is shown.
    """
    if free * normed:
        turned = "turn" if free * normed < 0 else "do not turn"
        return f"Norms {turned} the order round", -1 if (free, normed) == (-1, 1) else 1
    against = "GELU is ahead without them" if free == 1 else "ReLU is ahead with them" if normed == -1 else ""
    if against:
        return f"Norms do not turn the order round as published: {against}", 1
    return "That norms turn the order round is not shown", 0


def _gone(arms: dict[str, list[Record]]) -> str:
    """The lost runs of the four arms, and the seeds that are not paired."""
    gone = lost_of(**{words.arm_words(arm): records for arm, records in arms.items()})
    return gone + not_paired(arms["relu"], arms["gelu"]) + not_paired(arms["ln+relu"], arms["ln+gelu"])


def overloaded(view: View) -> list[str]:
    """Is GELU's overload there?"""
    lines = []
    for rung, prefix, _ in CASES:
        arms = {arm: view.own(rung, prefix + arm) for arm in FOUR}
        if not any(arms.values()):
            lines.append(f"{about(rung, prefix)}: {absent(view, rung, prefix + 'gelu')}.")
            continue
        each = ", ".join(
            f"{words.arm_words(arm)} {shares(found, 'overload')} %"
            if overload(found)
            else f"{words.arm_words(arm)}: {'no run survived' if found else absent(view, rung, prefix + arm)}"
            for arm, found in arms.items()
        )
        gone = lost_of(**{words.arm_words(arm): found for arm, found in arms.items()})
        head = f"{about(rung, prefix)}, {tokens_of(next(filter(None, arms.values())))}"
        text = f"{head}: overloaded heads at the end: {each}; {gone}."
        near = ", ".join(f"{words.arm_words(arm)} {shares(found, 'near')}" for arm, found in arms.items() if found)
        text += f" In percent at or above {NEAR:g} of the ceiling: {near}."
        against_norms = view.gap(arms["gelu"], arms["ln+gelu"], "overload")
        against_relu = view.gap(arms["relu"], arms["gelu"], "overload")
        if against_norms is not None:
            text += f" {_overload_of(against_norms)}{_overload_at_common(view, rung, prefix)}."
        if against_relu is not None:
            text += (
                f" {preliminary(against_relu)}Without norms, ReLU {words.MINUS} GELU is "
                f"{words.interval(points(against_relu), 1)} percentage points{_gap_as_published(against_relu, -1)}"
                f"{_at_another_threshold(against_relu, view.gap(arms['relu'], arms['gelu'], 'near'))}."
            )
        lines.append(text)
    return [*lines, f"{_published_overload()}."]


def _overload_of(gap: Difference) -> str:
    there = {1: "is there", -1: "is not there", 0: "in the one seed" if gap.single else "is not shown"}[gap.sign]
    return (
        f"{preliminary(gap)}GELU's overload {there}: {words.interval(points(gap), 1)} percentage points more than "
        f"with norms{_gap_as_published(gap, 1)}"
    )


def _at_another_threshold(gap: Difference, near: Difference | None) -> str:
    """Where heads at the ceiling say the opposite of what overloaded heads say."""
    if near is None or near.sign * gap.sign != -1:
        return ""
    found = f"{words.interval(points(near), 1)} percentage points"
    return f"; **at {NEAR:g} of the ceiling it is the other way round**: {found}"


def _overload_at_common(view: View, rung: str, prefix: str) -> str:
    """With norms the best rate is another one, at which heads differ too."""
    common = None if prefix else view.common_rate(rung)
    if common is None:
        return ""
    gap = view.gap(view.reported(rung, "gelu", common), view.reported(rung, "ln+gelu", common), "overload")
    return f"; at the common rate, {words.rate_name(common)}, {words.interval(points(gap), 1)}" if gap else ""


def _published_overload() -> str:
    each = ", ".join(f"{words.arm_words(arm)} {share} %" for arm, share in PUBLISHED_OVERLOAD.items())
    figures = "the figures count the heads of the printed maps, whose values are rounded: 22 % for ReLU"
    return f"Published for GPT-2 124M, T = 128, after {PUBLISHED_STEPS:,} steps, as printed: {each}; {figures}"


QUESTIONS = {
    "Does ReLU beat GELU without norms, and the other way round with them?": order,
    "Is GELU's overload there?": overloaded,
    "How much of both does the scale of the input explain?": scale,
    "Are overloaded heads wasted?": wasted,
    "What becomes of the model without norms and activation?": collapse,
    "Do learned slopes go to zero?": slopes,
    "What do the final norm and the original's deviations do?": deviations,
}

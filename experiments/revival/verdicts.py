"""The study's verdicts: sentences made of the numbers, never typed. Each question has one function, a list of lines.

"not run" stands where cells are missing, "preliminary" under five paired seeds, and the lost runs beside every mean.
"""

import math
from collections.abc import Sequence

from revival import words
from revival.cases import CASES, about, lost_of, preliminary, quarters, tokens_of
from revival.records import Record, is_lost
from revival.statistics import Difference, difference, paired
from revival.verdicts_inside import collapse, slopes, wasted
from revival.view import FOUR, View, overload

# ln of the published perplexities on CodeParrot, after 2.1 billion tokens, one seed each: ReLU minus GELU, nats.
PUBLISHED_GAP = {
    "Pythia-70M, T = 128": {"none": math.log(3.736 / 4.086), "norms": math.log(3.590 / 3.512)},
    "GPT-2 124M, T = 128": {"none": math.log(2.936 / 3.197), "norms": math.log(2.757 / 2.688)},
    "Pythia-70M, T = 256": {"none": math.log(3.273 / 3.570), "norms": math.log(3.107 / 3.054)},
}


def order(view: View) -> list[str]:
    """Does ReLU beat GELU without norms, by how much, at tuned rates; does the order flip with norms?"""
    lines = []
    for rung, prefix, published in CASES:
        for norm, one, other in (("none", "relu", "gelu"), ("norms", "ln+relu", "ln+gelu")):
            with_norms = "With LayerNorm" if norm == "norms" else "Without block norms"
            head = f"{with_norms} ({about(rung, prefix)})"
            ours, theirs = view.own(rung, prefix + one), view.own(rung, prefix + other)
            lines.append(_order(view, head, ours, theirs, PUBLISHED_GAP[published][norm]))
            common = view.common_rate(rung) if not prefix else None
            if common is not None and {view.own_rate(rung, one), view.own_rate(rung, other)} != {common}:
                pair = view.reported(rung, one, common), view.reported(rung, other, common)
                if all(pair):
                    lines.append(_order(view, f"{head}, at the common rate", *pair, PUBLISHED_GAP[published][norm]))
        lines += _flip(view, rung, prefix)
    return lines


def _order(view: View, head: str, ours: Sequence[Record], theirs: Sequence[Record], published: float) -> str:
    if not ours or not theirs:
        return f"{head}: not run."
    gap = view.gap(ours, theirs)
    gone = lost_of(ReLU=ours, GELU=theirs)
    if gap is None:
        return f"{head}, {tokens_of(ours)}: no seed of which both arms survived ({gone})."
    who = {-1: "ReLU beats GELU", 1: "GELU beats ReLU", 0: "ReLU and GELU are not told apart"}[gap.sign]
    rates = f"rates {words.rate_name(ours[0]['lr'])} and {words.rate_name(theirs[0]['lr'])}"
    package = words.interval(view.gap(ours, theirs, "val_package_loss"))
    return (
        f"{preliminary(gap)}{head}, {tokens_of(ours)}, {rates}: {who}: ReLU {words.MINUS} GELU is "
        f"{words.interval(gap)} nats on val, {package} on val_package; on the trainer's own tokens "
        f"{quarters(view, ours, theirs)} of the run; {gone}. Published after 2.1 billion tokens of "
        f"CodeParrot, one seed: {words.signed(published, 3)} nats"
        f"{_agreement(gap, published)}."
    )


def _agreement(gap: Difference, published: float) -> str:
    if gap.sign == 0:
        return ""
    return ", the same order" if gap.sign == (1 if published > 0 else -1) else ". **This contradicts the paper**"


def _flip(view: View, rung: str, prefix: str) -> list[str]:
    """Whether norms turn the order round: the difference of the two differences, seed by seed."""
    arms = {arm: view.own(rung, prefix + arm) for arm in FOUR}
    if not all(arms.values()):
        return []
    free, normed = view.gap(arms["relu"], arms["gelu"]), view.gap(arms["ln+relu"], arms["ln+gelu"])
    if free is None or normed is None:
        return []
    change = paired(free.points, normed.points)
    flips = free.sign * normed.sign == -1
    verdict = "Norms turn the order round" if flips else "That norms turn the order round is not shown"
    return [
        f"{preliminary(change) if change else ''}{verdict} ({about(rung, prefix)}): the advantage of ReLU changes by "
        f"{words.interval(change)} nats when norms are taken out; {lost_of(**_named(arms))}."
    ]


def _named(arms: dict[str, list[Record]]) -> dict[str, list[Record]]:
    return {words.arm_words(arm): records for arm, records in arms.items()}


def overloaded(view: View) -> list[str]:
    """Is GELU's overload there?"""
    lines = []
    for rung, prefix, _ in CASES:
        arms = {arm: view.own(rung, prefix + arm) for arm in FOUR}
        if not any(arms.values()):
            lines.append(f"{about(rung, prefix)}: not run.")
            continue
        shares = ", ".join(
            f"{words.arm_words(arm)} {words.mean(overload(found), 1, 100)} % (lost {words.lost_words(found)})"
            for arm, found in arms.items()
            if found
        )
        head = f"{about(rung, prefix)}, {tokens_of(next(filter(None, arms.values())))}"
        text = f"{head}: heads at or above 3/4 of the ceiling at the end: {shares}."
        gap = paired(overload(arms["gelu"]), overload(arms["ln+gelu"]))
        if gap is not None:
            there = {1: "is there", -1: "is not there", 0: "is not shown"}[gap.sign]
            points = difference({seed: 100 * value for seed, value in gap.points.items()})
            text += (
                f" {preliminary(gap)}GELU's overload {there}: {words.interval(points, 1)} points more than with norms."
            )
        lines.append(f"{text} Published (GPT-2, 2.1 billion tokens): 8, 3, 58 and 23 %.")
    return lines


def scale(view: View) -> list[str]:
    """How much of the advantage and of the overload does the scale of the input explain?"""
    relu, gelu = view.own("A", "relu"), view.own("A", "gelu")
    before = view.gap(relu, gelu)
    lines = []
    for variant in ("+embed22.627", "+embed50", "-ffbias", "+depth"):
        ours, theirs = view.own("B", f"relu{variant}"), view.own("B", f"gelu{variant}")
        lines.append(_scaled(view, words.arm_words(f"gelu{variant}").partition(", ")[2], before, gelu, ours, theirs))
    for variant in ("+beta10", "+beta60"):
        name = words.arm_words(f"gelu{variant}").partition(", ")[2] + " (ReLU is the same at every such scale)"
        lines.append(_scaled(view, name, before, gelu, relu, view.own("B", f"gelu{variant}")))
    return lines


def _scaled(
    view: View,
    name: str,
    before: Difference | None,
    base: Sequence[Record],
    ours: Sequence[Record],
    theirs: Sequence[Record],
) -> str:
    after = view.gap(ours, theirs) if ours and theirs else None
    if before is None or after is None:
        return f"Without norms, {name}: not run." if not theirs else f"Without norms, {name}: {lost_of(GELU=theirs)}."
    gained = paired({r["seed"]: float(r["val_loss"]) for r in theirs if not is_lost(r)},
                    {r["seed"]: float(r["val_loss"]) for r in base if not is_lost(r)})  # fmt: skip
    shares = words.mean(overload(base), 1, 100), words.mean(overload(theirs), 1, 100)
    return (
        f"{preliminary(after)}Without norms, {name}, {tokens_of(theirs)}: ReLU {words.MINUS} GELU is "
        f"{words.interval(after)} nats "
        f"({quarters(view, ours, theirs)} of the run) instead of {words.interval(before)}"
        f"{_explained(before, after)}; GELU's own loss changes by {words.interval(gained)} "
        f"nats, and its overloaded heads from {shares[0]} to {shares[1]} %; {lost_of(ReLU=ours, GELU=theirs)}."
    )


def _explained(before: Difference, after: Difference) -> str:
    if before.sign == 0:
        return " (which was not told apart from 0, so that no share of it can be explained)"
    return f": {100 * (1 - after.mean / before.mean):.0f} % of it is gone"


def deviations(view: View) -> list[str]:
    """What do the final norm and each deviation of the original do? Paired with rung A's runs of the same seeds."""
    lines = []
    for variant in ("-finalnorm", "+dropout", "+fp16", "+depth"):
        for arm in ("gelu", "relu"):
            ours = view.own("F", arm + variant)
            theirs = view.reported("A", arm, ours[0]["lr"]) if ours else []
            name = words.arm_words(arm + variant)
            if not ours:
                lines.append(f"{name}: not run.")
                continue
            gap = view.gap(ours, theirs)
            gone = lost_of(**{"changed": ours, "as on rung A": theirs})
            shares = f"{words.mean(overload(theirs), 1, 100)} to {words.mean(overload(ours), 1, 100)} %"
            if gap is None:
                lines.append(f"{name}: no seed of which both survived; {gone}.")
            else:
                lines.append(
                    f"{preliminary(gap)}{name}, {tokens_of(ours)}: the loss changes by {words.interval(gap)} nats "
                    f"({quarters(view, ours, theirs)} of the run), overloaded heads from {shares}; {gone}."
                )
    return lines


QUESTIONS = {
    "Does ReLU beat GELU without norms, and the other way round with them?": order,
    "Is GELU's overload there?": overloaded,
    "How much of both does the scale of the input explain?": scale,
    "Are overloaded heads wasted?": wasted,
    "What becomes of the model without norms and activation?": collapse,
    "Do learned slopes go to zero?": slopes,
    "What do the final norm and the original's deviations do?": deviations,
}

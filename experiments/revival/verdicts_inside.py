"""Verdicts on what is inside the models: heads, learned slopes, and the collapse of the softmax-only model."""

from collections.abc import Sequence

import numpy as np

from revival import words
from revival.cases import CASES, about, absent, lost_of, preliminary, tokens_of, unsettled
from revival.heads_table import SMALL, Costs, at_once, costs, per_seed, replaceable
from revival.records import Record, is_lost, numbers
from revival.statistics import ENOUGH, Difference, difference, paired
from revival.tuning import REFINED
from revival.view import FOUR, NEAR, View, lost

WASTED = (
    "Cost is the change of loss in nats when uniform attention takes a head's place: the mean over each model's heads, "
    "then over the seeds that have any."
)


def wasted(view: View) -> list[str]:
    """Are overloaded heads wasted?"""
    lines = []
    for rung, prefix, _ in CASES:
        for arm in FOUR:
            everyone = view.own(rung, prefix + arm)
            told = rung in REFINED and everyone == view.own(REFINED[rung], arm)  # as the other rung's
            if everyone and not told:
                lines.append(_wasted(f"{words.arm_words(arm)} ({about(rung, prefix)})", everyone))
    return [WASTED, *lines] if lines else ["Not run."]


def _wasted(name: str, everyone: Sequence[Record]) -> str:
    records = replaceable(everyone)
    gone = f"lost: {words.lost_words(everyone)}"
    if not records:
        return f"{name}, {tokens_of(everyone)}: no run survived whose heads could be replaced; {gone}."
    found = costs(records)
    chosen = found.overloaded
    few = "Preliminary: " if len(records) < ENOUGH else ""
    if not chosen.any():
        return f"{few}{name}, {tokens_of(records)}: no head is overloaded; {gone}."
    cheap = int((found.uniform[chosen] < SMALL).sum())
    mine = per_seed(records, "uniform", overloaded=True)
    few = "Preliminary: " if len(mine) < ENOUGH else ""
    rest = per_seed(records, "uniform", overloaded=False)
    others = f", any other head {words.interval(difference(rest), 5)}" if rest else ""
    both = [difference(at_once(records, kind)) for kind in ("uniform", "mean")]
    together = [words.interval(gap) for gap in both]
    shown = "in the one seed that there is" if both[0].single else "that they are of use together is not shown"
    told = "together they are of use" if both[0].sign > 0 else shown
    one = words.interval(difference(mine), 5)
    return (
        f"{few}{name}, {tokens_of(records)}: {told}: with uniform attention in all overloaded heads a model's loss "
        f"rises by {together[0]} nats, with their own mean attention by {together[1]}. One costs {one}{others}; less "
        f"than {SMALL:g}: {cheap} of {int(chosen.sum())}{_near(found)}; {gone}."
    )


def _near(found: Costs) -> str:
    """Of the overloaded heads, those that hardly choose at all."""
    near = found.level >= NEAR
    if not near.any():
        return f", of which none is at {NEAR:g} of the ceiling"
    cheap = int((found.uniform[near] < SMALL).sum())
    return f", and {cheap} of the {int(near.sum())} at {NEAR:g} of the ceiling or above"


# -- learned slopes ----------------------------------------------------------------------------------------------------


def slopes(view: View) -> list[str]:
    """Do learned slopes go to zero without decay? Every slope is tested, not their mean: + and - would cancel."""
    arms = view.arms("E")
    lines = [_slopes(view, arm) for arm in arms]
    for arm in arms:
        other = f"{arm.removesuffix('nodecay')}decay"
        if arm.endswith(":nodecay") and other in arms:
            lines.append(_decay(view, arm, other))
    return lines or ["Not run."]


def _slopes(view: View, arm: str) -> str:
    everyone = view.own("E", arm)
    if not everyone:
        return f"{words.slope_words(arm)}: {absent(view, 'E', arm)}."
    kept = _sloped(everyone)
    gone = f"lost: {words.lost_words(everyone)}" + unsettled(view, **{"ReLU, whose rate it has,": ("A", "relu")})
    if not kept:
        return f"{words.slope_words(arm)}, {tokens_of(everyone)}: no run survived; {gone}."
    starts, ends = ({r["seed"]: numbers(r["slopes"]["values"])[i] for r in kept} for i in (0, -1))
    n = len(next(iter(ends.values())))
    at_zero = [difference({seed: float(end[i]) for seed, end in ends.items()}) for i in range(n)]
    moved = [difference({seed: float(end[i] - starts[seed][i]) for seed, end in ends.items()}) for i in range(n)]
    size = difference(mean_size(kept))
    every = np.concatenate(list(ends.values()))
    ranged = f"slopes from {words.signed(float(every.min()), 3)} to {words.signed(float(every.max()), 3)} over "
    ranged += "layers and seeds" if n > 1 else "seeds"
    if len(kept) == 1:
        told = "one seed tells no slope apart from 0 or from its start"
    elif n == 1:
        apart = ["told apart" if gap.sign else "not told apart" for gap in (*at_zero, *moved)]
        told = f"it is {apart[0]} from 0 and {apart[1]} from the start"
    else:
        told = (
            f"of {n} slopes {sum(gap.sign != 0 for gap in at_zero)} told apart "
            f"from 0 and {sum(gap.sign != 0 for gap in moved)} from the start"
        )
    return (
        f"{preliminary(size)}{words.slope_words(arm)}, {tokens_of(kept)}: at the end mean |slope| is {_size(size)}, "
        f"{ranged}; {told}; {gone}."
    )


def _size(size: Difference) -> str:
    return words.interval(size, 4).lstrip("+")


def _decay(view: View, without: str, with_: str) -> str:
    """No decay against decay: mean |slope|, seed by seed."""
    pair = view.own("E", without), view.own("E", with_)
    head = f"{words.slope_words(without)}, against decay of the original's total"
    gone = lost_of(**{"no decay": pair[0], "decay": pair[1]})
    gap = paired(mean_size(_sloped(pair[0])), mean_size(_sloped(pair[1])))
    if gap is None:
        return f"{head}: no seed of which both survived; {gone}."
    what = {1: "slopes end larger without decay", -1: "slopes end smaller without decay", 0: "not told apart"}[gap.sign]
    loss = words.interval(view.gap(*pair))
    return (
        f"{preliminary(gap)}{head}, {tokens_of(pair[0])}: {what}: mean |slope| without decay {words.MINUS} with it is "
        f"{words.interval(gap)}; the loss differs by {loss} nats; {gone}."
    )


def _sloped(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if not is_lost(r) and "slopes" in r]


def mean_size(records: Sequence[Record]) -> dict[int, float]:
    """seed -> mean |slope| over layers at the end of the run."""
    return {r["seed"]: float(np.abs(numbers(r["slopes"]["values"])[-1]).mean()) for r in records}


# -- the softmax-only model --------------------------------------------------------------------------------------------


def collapse(view: View) -> list[str]:
    """What becomes of the softmax-only model."""
    lines = []
    for arm in view.arms("D"):
        records = view.own("D", arm)
        steps = [r["lost"]["step"] for r in records if is_lost(r)]
        on_the_way = [step for step in steps if step is not None]
        when = f", {len(on_the_way)} at steps {min(on_the_way)} to {max(on_the_way)}" if on_the_way else ""
        when += f", {steps.count(None)} by the final loss" if None in steps else ""
        if arm.startswith("paper_nan"):
            how = "nothing stops it, fp16"
        else:
            how = "bf16, stops at its first bad step, which alone makes it count as lost"
        nan = sum(bool(r.get("nan_counts", {}).get("attn_probs")) for r in records)
        few = "Preliminary: " if lost(records)[1] < ENOUGH else ""
        lines.append(
            f"{few}Softmax-only GPT-2 ({how}), planned {tokens_of(records)}: lost {words.lost_words(records)}{when}; "
            f"NaN in attention probabilities in {nan} of {len(records)} runs."
        )
    return lines or ["Not run."]

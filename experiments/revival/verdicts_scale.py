"""Verdicts on rungs B and F: what the scale of the input explains, and what each deviation of the original does."""

import math
from collections.abc import Sequence

from revival import words
from revival.cases import (
    absent,
    lost_of,
    not_far,
    not_paired,
    not_there,
    points,
    preliminary,
    quarters,
    shares,
    splits,
    tokens_of,
    unsettled,
)
from revival.cells import TUNING_SEED
from revival.records import Record
from revival.statistics import Difference, difference, paired
from revival.view import View, far_off

CHANGED, BASE = "changed", "rung A"
BOTH = ("+embed22.627", "+embed50", "-ffbias", "+depth")  # variants of GELU and of ReLU
GELU_ONLY = ("+beta10", "+beta60")  # relu(b x) / b is relu(x)
CONTROL = "ln+gelu+embed22.627"
DEPTH = "+depth"  # a deviation of the original that rung B trains, at a rate of its own
DEVIATIONS = ("-finalnorm", "+dropout", "+fp16", DEPTH)


def scale(view: View) -> list[str]:
    """How much of the advantage and of the overload does the scale of the input explain?"""
    lines = [_scaled(view, variant, ("B", f"relu{variant}")) for variant in BOTH]
    lines += [_scaled(view, variant, ("A", "relu")) for variant in GELU_ONLY]
    return [*lines, _control(view)]


def _scaled(view: View, variant: str, relu: tuple[str, str]) -> str:
    """ReLU against GELU where the scale was changed, and before."""
    name = words.change_words(variant)
    gelu = ("B", f"gelu{variant}")
    if not {relu, gelu} & {("B", arm) for arm in view.arms("B")}:
        return f"Without norms, {name}: not run."
    if missing := not_there(view, ReLU=relu, GELU=gelu):
        return f"Without norms, {name}: {missing}."
    ours, theirs = view.own(*relu), view.own(*gelu)
    base_relu, base = view.own("A", "relu"), view.own("A", "gelu")
    gone = f"rates {words.rate_name(ours[0]['lr'])} and {words.rate_name(theirs[0]['lr'])}; "
    gone += f"{lost_of(ReLU=ours, GELU=theirs)}; on rung A {lost_of(ReLU=base_relu, GELU=base)}"
    gone += not_paired(ours, theirs) + unsettled(view, ReLU=relu, GELU=gelu)
    head = f"Without norms, {name}, {tokens_of(theirs)}"
    before, after = view.gap(base_relu, base), view.gap(ours, theirs)
    if after is None:
        return f"{head}: no seed of which both survived and compare; {gone}."
    change = paired(after.points, before.points) if before else None
    alone = f"GELU alone: {_own(view, theirs, base)}."
    if variant not in GELU_ONLY:
        alone += f" ReLU alone: {_own(view, ours, base_relu)}."
    became = _explained(before, after, change, set(far_off(ours)) | set(far_off(theirs)))
    return (
        f"{preliminary(after, change)}{head}: ReLU {words.MINUS} GELU is {splits(view, ours, theirs)}, {became}; "
        f"{quarters(view, ours, theirs)}. {alone} {gone[0].upper()}{gone[1:]}.{_at_common(view, relu, gelu)}"
    )


def _at_common(view: View, relu: tuple[str, str], gelu: tuple[str, str]) -> str:
    """The same at rung A's common rate, the published one: over reported seeds, or on the tuning seed alone."""
    common = view.common_rate("A")
    if common is None:
        return ""
    before, after = (
        view.gap(*(view.reported(*arm, common) for arm in pair))
        for pair in ((("A", "relu"), ("A", "gelu")), (relu, gelu))
    )
    if before and after:
        change = paired(after.points, before.points)
        far = {seed for arm in (relu, gelu) for seed in far_off(view.reported(*arm, common))}
        text = f"{words.interval(after)} nats, {_explained(before, after, change, far)}"
        return f" {preliminary(after, change)}At the common rate, {words.rate_name(common)}: {text}."
    alone = at_rate(view, common, ("A", "relu"), ("A", "gelu")), at_rate(view, common, relu, gelu)
    if None in alone:
        return ""
    shown = [words.signed(gap, 3) for gap in alone if gap is not None]
    return (
        f" At the common rate, {words.rate_name(common)}, seed {TUNING_SEED} alone, on the tokens that choose rates: "
        f"{shown[1]} instead of {shown[0]}."
    )


def at_rate(view: View, lr: float, ours: tuple[str, str], theirs: tuple[str, str]) -> float | None:
    """The difference of two arms at a rate on the tuning seed; None where one was not run at it, or was lost."""
    one, other = (view.tuning(*arm).get(lr, math.inf) for arm in (ours, theirs))
    return one - other if math.isfinite(one) and math.isfinite(other) else None


def _explained(before: Difference | None, after: Difference, change: Difference | None, far: set[int]) -> str:
    """What became of the difference that was there before, on the seeds that both have; `far`: seeds that are far off,
    without which the change is given too.
    """
    if before is None or change is None:
        return "and there is no seed that it can be compared with on rung A"
    base = difference({seed: before.points[seed] for seed in change.points})
    same = "" if change.n == before.n else "the same seeds of "
    text = f"instead of {words.interval(base)} on {same}rung A, a change of {words.interval(change)}"
    rest = {seed: value for seed, value in change.points.items() if seed not in far}
    text += f" (without what is far off {words.interval(difference(rest))})" if 0 < len(rest) < change.n else ""
    if before.sign == 0:
        return f"{text} (before, it was not told apart from 0, so that no share of it can be explained)"
    if change.sign == 0:
        return f"{text}: no change is shown"
    if base.mean * after.mean < 0:
        turned = "the order turns round" if after.sign else "the mean changes its sign, but is not told apart from 0"
        return f"{text}: {turned}"
    gone = -100 * change.mean / base.mean
    kind = f"{gone:.0f} % of it is gone" if gone >= 0 else f"it grows by {-gone:.0f} %"
    return f"{text}: {kind}, as a point estimate"


def _own(view: View, ours: Sequence[Record], base: Sequence[Record]) -> str:
    """How one arm's loss and overload differ from those of its base, seed by seed."""
    heads = f"{shares(base, 'overload')} to {shares(ours, 'overload')} %"
    change = words.interval(points(view.gap(ours, base, "overload")), 1)
    if far_off(ours):
        change += f"; without what is far off {words.interval(points(view.gap(not_far(ours), base, 'overload')), 1)}"
    return (
        f"its loss changes by {words.interval(view.gap(ours, base))} nats, its overloaded heads from {heads} "
        f"(paired: {change} percentage points)"
    )


def _control(view: View) -> str:
    """Scaled embeddings where block norms take the scale out again."""
    name = f"Control: {words.arm_words(CONTROL)}"
    arms = {CHANGED: ("B", CONTROL), BASE: ("A", "ln+gelu")}
    if not view.own("B", CONTROL):
        return f"{name}: {absent(view, 'B', CONTROL)}."
    return _changed(view, name, arms)


def _changed(view: View, name: str, arms: dict[str, tuple[str, str]], theirs: Sequence[Record] | None = None) -> str:
    """One arm against its base. `theirs`: the base's runs, where not those at its own rate."""
    ours = view.own(*arms[CHANGED])
    theirs = view.own(*arms[BASE]) if theirs is None else theirs
    gone = lost_of(**{CHANGED: ours, BASE: theirs}) + not_paired(ours, theirs) + unsettled(view, **arms)
    gap = view.gap(ours, theirs)
    rates = f"rate {words.rate_name(ours[0]['lr'])}"
    if gap is None:
        return f"{name}, {tokens_of(ours)}, {rates}: no seed of which both survived and compare; {gone}."
    what = {-1: "better", 1: "worse", 0: words.untold(gap)}[gap.sign]
    heads = f"{shares(theirs, 'overload')} to {shares(ours, 'overload')} %"
    change = words.interval(points(view.gap(ours, theirs, "overload")), 1)
    return (
        f"{preliminary(gap)}{name}, {tokens_of(ours)}, {rates}: {what}: the loss changes by "
        f"{splits(view, ours, theirs)}; {quarters(view, ours, theirs)}. Overloaded heads from {heads} "
        f"(paired: {change} percentage points); {gone}."
    )


def deviations(view: View) -> list[str]:
    """What do the final norm and each deviation of the original do? Paired with rung A's runs of the same seeds."""
    lines = []
    for variant in DEVIATIONS:
        for arm in ("gelu", "relu"):
            rung = "B" if variant == DEPTH else "F"
            name = words.arm_words(arm + variant) + (" (rung B, at its own best rate)" if rung == "B" else "")
            ours = view.own(rung, arm + variant)
            if not ours:
                lines.append(f"{name}: {absent(view, rung, arm + variant)}.")
                continue
            arms = {CHANGED: (rung, arm + variant), BASE: ("A", arm)}
            theirs = view.reported("A", arm, ours[0]["lr"]) if rung == "F" else None
            lines.append(_changed(view, name, arms, theirs))
    return lines

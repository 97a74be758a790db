"""Choosing a peak learning rate: the ladder of rates, when its optimum is interior, and a rate common to all arms."""

import math
from collections.abc import Mapping, Sequence

MOST_ADDED = 4  # rates beyond the ladder, at either end
FACTOR = 2.0
REFINED = {"A2": "A"}  # a rung between the rates of another one, whose runs of the same arm are as good as its own


def rate_name(lr: float) -> str:
    """1e-3, 2.5e-4: as short as the number allows."""
    mantissa, exponent = f"{lr:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate of the lowest loss (the lower one of two equal ones); None where every run was lost."""
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda lr: (finite[lr], lr)) if finite else None


def rates_to_try(ladder: Sequence[float], losses: Mapping[float, float]) -> list[float]:
    """What is still to be trained: the rest of the ladder, then one more beyond the end the optimum lies at.

    Empty once the optimum has a worse (or lost) rate on both sides, or `MOST_ADDED` rates beyond an end did not help.
    """
    missing = [lr for lr in ladder if lr not in losses]
    if missing:
        return missing
    best = best_rate(losses)
    lowest, highest = min(losses), max(losses)
    if best is None or best == lowest:  # all were lost: lower rates
        return [] if lowest < min(ladder) / FACTOR ** (MOST_ADDED - 0.5) else [_rounded(lowest / FACTOR)]
    if best == highest:
        return [] if highest > max(ladder) * FACTOR ** (MOST_ADDED - 0.5) else [_rounded(highest * FACTOR)]
    return []


def is_interior(losses: Mapping[float, float]) -> bool:
    """Whether the best rate has a worse or lost one on both sides."""
    best = best_rate(losses)
    return best is not None and min(losses) < best < max(losses)


def common_rate(arms: Sequence[Mapping[float, float]]) -> float | None:
    """The rate of the lowest summed loss among those tried by every arm and lost by none; None where there is none."""
    shared = set.intersection(*(set(losses) for losses in arms)) if arms else set()
    sums = {lr: sum(losses[lr] for losses in arms) for lr in shared}
    return best_rate(sums)


def around(lr: float) -> tuple[float, ...]:
    """Three rates: half, the same, double."""
    return _rounded(lr / FACTOR), _rounded(lr), _rounded(lr * FACTOR)


def between(lr: float) -> tuple[float, float]:
    """Half a step below and above: the rate over and times the square root of `FACTOR`, in two digits."""
    return float(f"{lr / math.sqrt(FACTOR):.1e}"), float(f"{lr * math.sqrt(FACTOR):.1e}")


def _rounded(lr: float) -> float:
    return float(rate_name(lr))

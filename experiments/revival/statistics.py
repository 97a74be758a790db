"""The study's statistics, fixed before the runs: paired differences over seeds, and how many runs of n were lost."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plotting.seeds import mean_interval

ENOUGH = 5  # seeds of a verdict; below it stands the word preliminary
_STEPS = 60  # of the bisection: far below the last digit of a float


@dataclass(frozen=True)
class Difference:
    """Paired differences, seed by seed. `half`: half width of the 95 % t interval; None for a single pair."""

    points: dict[int, float]
    mean: float
    half: float | None

    @property
    def n(self) -> int:
        return len(self.points)

    @property
    def preliminary(self) -> bool:
        return self.n < ENOUGH

    @property
    def single(self) -> bool:
        """One pair has no interval: nothing is told apart, however large it is."""
        return self.half is None

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval leaves out 0, else 0: not told apart."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """ours - theirs at every seed that both have; None where they share none."""
    points = {seed: ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs}
    return difference(points) if points else None


def difference(points: Mapping[int, float]) -> Difference:
    """Mean and interval of differences that are already paired."""
    mean, half = mean_interval(list(points.values()))
    return Difference(dict(points), float(mean), float(half) if len(points) > 1 else None)


def binomial_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of which k of n were seen (Clopper and Pearson, 1934)."""
    assert 0 <= k <= n, f"{k} of {n}"
    assert n > 0, "no trial, no interval"
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else _solve(lambda p: 1 - _at_most(k - 1, n, p) - tail)
    high = 1.0 if k == n else _solve(lambda p: tail - _at_most(k, n, p))
    return low, high


def _at_most(k: int, n: int, p: float) -> float:
    """Probability of at most k successes in n trials."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def _solve(rising: Callable[[float], float]) -> float:
    """The root in [0, 1] of a function that rises through 0."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2

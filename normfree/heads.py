"""How spread out attention heads are: entropy ceilings, ranges, and the words overloaded, low and collapsed.

Only numpy: the trainer, the figures and the report share these definitions. Entropies are in nats. A head whose entropy
is NaN is in no range and gets no word; it is counted apart.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RANGES = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of the ceiling; half open, the last one closed
RANGE_NAMES = ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]")
LOW = 0.25
OVERLOADED = 0.75
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the rows of a head
ONE_HOT = 1e-3  # attention is nearly one-hot where the mean of 1 - max p lies below this


def row_ceiling(i: ArrayLike) -> NDArray[np.float64]:
    """Largest entropy of causal attention in row `i` (0-based), which sees i + 1 keys: ln(i + 1)."""
    return np.log1p(np.asarray(i, dtype=np.float64))


def entropy_ceiling(T: int) -> float:
    """Largest mean entropy of a causal head over a sequence of T tokens: ln(T!)/T, as every row i reaches ln(i + 1).

    3.8782 nats at T = 128, where ln T is 4.8520. 0 at T = 1: a single key leaves no choice.
    """
    assert T >= 1, f"a sequence has at least one token, not {T}"
    return math.lgamma(T + 1) / T


def relative_entropy(H: ArrayLike, T: int) -> NDArray[np.float64]:
    """A head's level r = H / (ln(T!)/T), between 0 and 1. NaN where H is NaN, and everywhere at T = 1 (0/0)."""
    return _relative(H, entropy_ceiling(T))


def _relative(H: ArrayLike, ceiling: float) -> NDArray[np.float64]:
    entropy = np.asarray(H, dtype=np.float64)
    return entropy / ceiling if ceiling > 0 else np.full_like(entropy, np.nan)


class RangeShares(NamedTuple):
    """Shares of all heads, NaN heads included: `shares.sum() + n_nan / n_head` is 1."""

    shares: NDArray[np.float64]  # (4,), one of each of RANGES
    n_nan: int
    n_head: int

    @property
    def nan_share(self) -> float:
        return self.n_nan / self.n_head


def range_shares(H: ArrayLike, T: int, *, ceiling: float | None = None) -> RangeShares:
    """Which share of the heads lies in each quarter of the ceiling; NaN heads are in none of them and counted apart.

    `ceiling` replaces ln(T!)/T, say by a maximum observed over several runs. Levels above 1 (rounding) belong to the
    last range. At T = 1 there is no level, and the shares are NaN. Shares of different T are not comparable.
    """
    entropy = np.asarray(H, dtype=np.float64).ravel()
    assert entropy.size, "no heads"
    ceiling = entropy_ceiling(T) if ceiling is None else ceiling
    n_nan = int(np.isnan(entropy).sum())
    if ceiling <= 0:
        return RangeShares(np.full(len(RANGES), np.nan), n_nan, entropy.size)
    level = _relative(entropy[~np.isnan(entropy)], ceiling)
    index = np.searchsorted([low for low, _ in RANGES[1:]], level, side="right")
    return RangeShares(np.bincount(index, minlength=len(RANGES)) / entropy.size, n_nan, entropy.size)


def is_overloaded(H: ArrayLike, T: int) -> NDArray[np.bool_]:
    """r >= 3/4: the head spreads its attention nearly as evenly as the causal mask lets it."""
    return relative_entropy(H, T) >= OVERLOADED


def is_low(H: ArrayLike, T: int) -> NDArray[np.bool_]:
    """r < 1/4. A description, no diagnosis: healthy previous-token heads are low."""
    return relative_entropy(H, T) < LOW


def is_collapsed(
    H: ArrayLike, T: int, *, one_minus_max: ArrayLike, max_score: ArrayLike, earlier_max_score: ArrayLike
) -> NDArray[np.bool_]:
    """Low, nearly one-hot, and still sharpening; the arrays have the shape of `H`, one value a head.

    `one_minus_max`: mean over rows of 1 - max_j p_j. `max_score`: the largest score before the softmax, now, and
    `earlier_max_score`: at an earlier record. NaN in any of them: not collapsed.
    """
    one_hot = np.asarray(one_minus_max) < ONE_HOT
    rising = np.asarray(max_score) > np.asarray(earlier_max_score)
    return is_low(H, T) & one_hot & rising

"""What the page carries is bit for bit what was recorded; what it leaves out is chosen well and counted."""

import numpy as np
import pytest

from normfree.report.packing import kept_records, pack, thinned, unpack


@pytest.mark.parametrize(
    "values",
    [
        np.array([[1.5, np.nan, -0.0], [np.inf, -np.inf, 1e-45]], np.float32),
        np.array([2**53 - 1, 0, -7]),
        np.array([0.1, np.nan, 1e308]),
        np.zeros((0, 4, 4), np.float32),
    ],
)
def test_every_bit_comes_back(values: np.ndarray) -> None:
    back = unpack(pack(values))
    assert back.shape == values.shape
    assert back.astype(values.dtype).tobytes() == values.tobytes()


def test_a_count_that_float64_cannot_hold_is_refused() -> None:
    with pytest.raises(AssertionError, match="2\\*\\*53"):
        pack(np.array([2**53 + 1]))


def test_few_records_are_all_kept() -> None:
    assert kept_records(np.arange(300)).tolist() == list(range(300))


@pytest.mark.parametrize("fault", [0, 137, 5001, 9990])
def test_of_many_records_both_ends_and_those_around_the_fault_are_kept(fault: int) -> None:
    steps = 10 * np.arange(1000)
    kept = steps[kept_records(steps, near=[fault])]
    assert kept[0] == 0
    assert kept[-1] == 9990
    assert len(kept) <= 300
    assert steps[steps >= fault][0] in kept
    assert fault == 0 or steps[steps < fault][-1] in kept
    assert np.diff(kept).max() <= 50


def test_a_long_curve_keeps_its_extremes_and_the_first_value_that_is_not_finite() -> None:
    steps = np.arange(50_000)
    values = np.random.default_rng(0).normal(size=50_000)
    values[31_234] = np.nan
    values[777], values[40_001] = 99.0, -99.0
    x, y = thinned(steps, values)
    assert len(x) <= 2003
    assert {0, 777, 31_234, 40_001, 49_999} <= set(x.tolist())
    np.testing.assert_array_equal(values[x], y)
    assert (np.diff(x) > 0).all()


def test_a_short_curve_is_left_alone() -> None:
    steps, values = np.arange(2000), np.full(2000, np.nan)
    assert thinned(steps, values) == (steps, values)

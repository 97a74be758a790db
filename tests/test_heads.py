"""Entropy ceilings, ranges and words: closed forms, edges, and the bars of the paper."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from normfree import heads

PAPER = json.loads((Path(__file__).parent / "fixtures" / "paper_heatmaps.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("T", [1, 2, 7, 128, 1024])
def test_the_ceiling_is_the_mean_of_the_row_ceilings(T: int) -> None:
    assert heads.entropy_ceiling(T) == pytest.approx(heads.row_ceiling(np.arange(T)).mean(), abs=1e-12)


def test_the_ceiling_has_the_published_values() -> None:
    published = {128: 3.8782, 256: 4.5596, 512: 5.2462, 1024: 5.9358}
    for T, value in published.items():
        assert heads.entropy_ceiling(T) == pytest.approx(value, abs=5e-5)
    assert heads.OVERLOADED * heads.entropy_ceiling(128) == pytest.approx(2.909, abs=5e-4)


def test_uniform_causal_attention_reaches_the_ceiling() -> None:
    T = 16
    attention = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    logs = np.log(attention, where=attention > 0, out=np.zeros_like(attention))
    entropy = -(attention * logs).sum(-1).mean()
    assert heads.relative_entropy(entropy, T) == pytest.approx(1.0)


def test_bins_are_half_open_and_the_last_is_closed() -> None:
    ceiling = heads.entropy_ceiling(128)
    edges = np.array([0.0, 0.25, 0.5, 0.75, 1.0]) * ceiling
    assert heads.range_shares(edges, 128).shares.tolist() == [0.2, 0.2, 0.2, 0.4]
    below = np.nextafter(edges[1:4], 0)
    assert heads.range_shares(below, 128).shares.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_float32_rounding_above_the_ceiling_is_the_last_range() -> None:
    top = np.float32(heads.entropy_ceiling(128)) * np.float32(1 + 1e-6)
    assert heads.range_shares(top, 128).shares.tolist() == [0, 0, 0, 1]


def test_nan_heads_are_counted_apart_and_never_as_zero() -> None:
    found = heads.range_shares(np.array([[0.0, np.nan], [3.8, np.nan]]), 128)
    assert found.shares.tolist() == [0.25, 0, 0, 0.25]
    assert (found.n_nan, found.n_head, found.nan_share) == (2, 4, 0.5)
    assert found.shares.sum() + found.nan_share == 1
    assert not heads.is_low(np.nan, 128)
    assert not heads.is_overloaded(np.nan, 128)


def test_a_sequence_of_one_token_has_no_level() -> None:
    assert heads.entropy_ceiling(1) == 0
    assert np.isnan(heads.relative_entropy([0.0, 0.0], 1)).all()
    found = heads.range_shares([0.0, np.nan], 1)
    assert np.isnan(found.shares).all()
    assert found.n_nan == 1
    assert not heads.is_low(0.0, 1)


def test_another_ceiling_moves_the_bins() -> None:
    assert heads.range_shares([2.95], 128).shares.tolist() == [0, 0, 0, 1]
    assert heads.range_shares([2.95], 128, ceiling=math.log(128)).shares.tolist() == [0, 0, 1, 0]


def test_collapsed_needs_all_three_signs() -> None:
    signs = {"one_minus_max": 1e-4, "max_score": 30.0, "earlier_max_score": 20.0}
    assert heads.is_collapsed(0.1, 128, **signs)
    assert not heads.is_collapsed(1.5, 128, **signs)
    assert not heads.is_collapsed(0.1, 128, **signs | {"one_minus_max": 0.05})
    assert not heads.is_collapsed(0.1, 128, **signs | {"earlier_max_score": 30.0})
    assert not heads.is_collapsed(0.1, 128, **signs | {"max_score": math.nan})


@pytest.mark.parametrize("name", PAPER["data"])
def test_the_paper_heat_maps_give_its_bars(name: str) -> None:
    """Within rounding of one percent, for the one ceiling ln(128!)/128; SM+R prints two values for cells on an edge."""
    found = heads.range_shares(PAPER["data"][name], 128)
    assert 100 * found.shares == pytest.approx(PAPER["published_percent"][name], abs=1.0)
    assert found.n_nan == 0


def test_ln_t_does_not_give_the_bars_of_the_paper() -> None:
    """The negative control: the loose ceiling hides the overload."""
    found = heads.range_shares(PAPER["data"]["SM+G"], 128, ceiling=math.log(128))
    assert abs(100 * found.shares[3] - PAPER["published_percent"]["SM+G"][3]) > 40

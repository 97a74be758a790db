"""Attention entropy against closed forms and against float64 of the same inputs."""

import math

import pytest
import torch

from normfree.config import ModelConfig
from normfree.diagnostics import Recorder, attention_entropy, entropy
from normfree.model import Transformer, init_weights


def materialised(q, k, scale, offset=0):
    """The definition: -sum p ln p of a causal softmax, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(offset)
    p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)


def inputs(T, largest, D=16, dtype=torch.float32, seed=0):
    """q, k (2, 3, T, D) whose largest score has absolute value `largest`."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, T, D, generator=generator)
    q = q * (largest / (q.double() @ k.double().transpose(-1, -2) * D**-0.5).abs().max())
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("largest", "tolerance"), [(1, 1e-4), (50, 1e-4), (500, 1e-4), (5000, 1e-3)])
@pytest.mark.parametrize("T", [1, 17, 128])
def test_random_inputs(T, largest, tolerance, dtype):
    q, k = inputs(T, largest, dtype=dtype)
    found = attention_entropy(q, k)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - materialised(q, k, 0.25)).abs().max() < tolerance


def test_uniform_attention_reaches_the_ceiling():
    q = torch.zeros(1, 1, 128, 8)
    found = attention_entropy(q, torch.randn_like(q))
    assert torch.allclose(found[0, 0], torch.arange(1, 129).float().log(), atol=1e-6)
    assert found.mean().item() == pytest.approx(math.lgamma(129) / 128, abs=1e-5)


def test_one_hot_attention_has_none():
    q = torch.eye(32).reshape(1, 1, 32, 32) * 1e4
    assert attention_entropy(q, q, scale=1.0).abs().max() < 1e-6


def test_a_nan_row_is_nan_and_only_that_row():
    q, k = inputs(16, 5)
    q[0, 1, 5, 0] = float("nan")
    found = attention_entropy(q, k)
    expected = torch.zeros(2, 3, 16, dtype=torch.bool)
    expected[0, 1, 5] = True
    assert found.isnan().equal(expected)
    k[1, 2, 7, 3] = float("nan")  # a key poisons the queries that see it
    expected[1, 2, 7:] = True
    assert attention_entropy(q, k).isnan().equal(expected)


def test_infinite_scores_follow_softmax():
    q, k = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    k[0, 0, 1] = float("inf")
    assert attention_entropy(q, k)[0, 0].isnan().tolist() == [False, True, True, True]
    k[0, 0, 1] = float("-inf")  # a key that no query attends to
    assert attention_entropy(q, k)[0, 0].tolist() == pytest.approx([0, 0, math.log(2), math.log(3)])


def test_scale_and_offset():
    q, k = inputs(24, 20)
    whole = attention_entropy(q, k, scale=0.7)
    assert torch.allclose(whole.double(), materialised(q, k, 0.7), atol=1e-5)
    assert torch.allclose(attention_entropy(q[:, :, 10:], k, scale=0.7, q_offset=10), whole[:, :, 10:], atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    q, k = inputs(40, 30)
    whole = attention_entropy(q, k)
    for elements in (1, 100, 40 * 40, 5000):
        monkeypatch.setattr(entropy, "CHUNK_ELEMENTS", elements)
        assert torch.allclose(attention_entropy(q, k), whole, atol=1e-5)


def test_no_map_beyond_a_chunk_is_held(monkeypatch):
    """The largest tensor of scores stays within the bound, at a length whose full map is 16 times that."""
    largest, rows = [], entropy._entropy_rows

    def watched(q, k, *rest):
        largest.append(q.size(0) * q.size(1) * k.size(1))
        return rows(q, k, *rest)

    monkeypatch.setattr(entropy, "CHUNK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(entropy, "_entropy_rows", watched)
    attention_entropy(torch.randn(1, 1, 1024, 4), torch.randn(1, 1, 1024, 4))
    assert max(largest) <= 1 << 16
    assert sum(largest) >= 1024 * 1024 / 2


def test_autocast_does_not_round_the_products():
    q, k = inputs(64, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (attention_entropy(q, k) - materialised(q, k, 0.25)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("q", "k", "offset"), [((2, 3, 4), (2, 3, 4), 0), ((1, 1, 4, 2), (1, 1, 3, 2), 0), ((1, 1, 2, 2), (1, 1, 4, 2), 3)]
)
def test_wrong_shapes_are_refused(q, k, offset):
    with pytest.raises(ValueError):
        attention_entropy(torch.zeros(q), torch.zeros(k), q_offset=offset)


def test_a_norm_free_model_starts_at_the_ceiling():
    """At initialisation without norms scores are nearly 0, so every head spreads evenly: ln(T!)/T."""
    model = Transformer(ModelConfig(norm="none", vocab_size=64, n_embd=64))
    init_weights(model, 0)
    recorder = Recorder(model, ["attn_entropy"])
    recorder.start()
    model(torch.randint(0, 64, (2, 128)))
    found = recorder.unpack(recorder.stop())["attn_entropy"]
    assert found == pytest.approx(3.8782, abs=1e-3)

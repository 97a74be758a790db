"""Attention entropy and its gradient against closed forms and against float64 of the same inputs."""

import math

import pytest
import torch

from normfree.config import ModelConfig
from normfree.diagnostics import Recorder, attention_entropy, entropy
from normfree.diagnostics.entropy import AttentionRows, attention_rows
from normfree.model import Transformer, init_weights


def materialised_rows(q, k, scale, offset=0):
    """The definitions, of all scores of a causal softmax at once, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(offset)
    scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1)
    # xlogy has a gradient at 0 that is not finite: there the limit, 0, is no part of the graph.
    entropy = -torch.where(p > 0, torch.special.xlogy(p, p.clamp(min=1e-300)), 0.0).sum(-1)
    return AttentionRows(entropy, scores.logsumexp(-1), scores.amax(-1), p[..., 0])


def materialised(q, k, scale, offset=0):
    return materialised_rows(q, k, scale, offset).entropy


def inputs(T, largest, D=16, dtype=torch.float32, seed=0):
    """q, k (2, 3, T, D); `largest` is the absolute value of the largest score of the last queries."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, T, D, generator=generator)
    q = q * (largest / (q[:, :, -128:].double() @ k.double().transpose(-1, -2) * D**-0.5).abs().max())
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("largest", "tolerance"), [(1, 1e-4), (50, 1e-4), (500, 1e-4), (5000, 1e-3)])
@pytest.mark.parametrize("T", [1, 17, 128])
def test_random_inputs(T, largest, tolerance, dtype):
    q, k = inputs(T, largest, dtype=dtype)
    found = attention_entropy(q, k)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - materialised(q, k, 0.25)).abs().max() < tolerance


@pytest.mark.parametrize("largest", [1, 500])
@pytest.mark.parametrize(("T", "heads"), [(1000, 2), (4096, 1)])
def test_long_rows(T, heads, largest):
    """The first, the middle and the last rows."""
    q, k = inputs(T, largest)
    found = attention_entropy(q[:1, :heads], k[:1, :heads])
    for start in (0, T // 2, T - 100):
        part = slice(start, start + 100)
        right = materialised(q[:1, :heads, part], k[:1, :heads], 0.25, start)
        assert (found[:, :, part] - right).abs().max() < 1e-4


def test_the_bare_form_would_fail():
    """Negative control: lse - sum p s of the same fp32 scores misses the limit that ours keeps."""
    q, k = inputs(128, 5000)
    scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(torch.ones(128, 128).triu(1) > 0, -1e30)
    bare = scores.logsumexp(-1) - (scores.softmax(-1) * scores).sum(-1)
    right = materialised(q, k, 0.25)
    assert (bare - right).abs().max() > 2 * (attention_entropy(q, k) - right).abs().max()


@pytest.mark.parametrize(("largest", "limit"), [(5, 1e-5), (500, 1e-4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_other_values_of_a_row(dtype, largest, limit):
    q, k = inputs(70, largest, dtype=dtype)
    found = attention_rows(q[:, :, 20:], k, q_offset=20)
    right = materialised_rows(q[:, :, 20:], k, 0.25, 20)
    for name in AttentionRows._fields:
        value = getattr(found, name)
        assert value.shape == (2, 3, 50)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (value - getattr(right, name)).abs().max() < limit, name


def test_two_keys():
    """Scores 0 and x: p = 1/(1 + e^x)."""
    x = torch.linspace(-30, 30, 41)
    k = torch.stack([torch.zeros_like(x), x], -1)[None, :, :, None]  # (1, 41, 2, 1)
    found = attention_rows(torch.ones_like(k), k, scale=1.0)
    sink, other = torch.sigmoid(-x), torch.sigmoid(x)
    assert torch.allclose(found.sink[0, :, 1], sink, atol=1e-6)
    assert torch.allclose(found.entropy[0, :, 1], -torch.xlogy(sink, sink) - torch.xlogy(other, other), atol=1e-6)
    assert torch.allclose(found.lse[0, :, 1], torch.nn.functional.softplus(x), atol=1e-5)
    assert found.max_score[0, :, 1].equal(x.clamp(min=0))
    assert found.entropy[0, :, 0].abs().max() < 1e-30
    assert found.sink[0, :, 0].eq(1).all()


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
    inf = float("inf")
    q, k = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    k[0, 0, 1] = inf
    found = attention_rows(q, k)
    for value in (found.entropy, found.sink):
        assert value[0, 0].isnan().tolist() == [False, True, True, True]
    assert found.lse[0, 0, 1:].isfinite().sum() == 0
    assert found.max_score[0, 0].tolist() == pytest.approx([2**0.5, inf, inf, inf])
    k[0, 0, 2, 0] = float("nan")  # NaN outranks inf
    assert attention_rows(q, k).max_score[0, 0, 2:].isnan().all()
    k[0, 0, 1], k[0, 0, 2] = -inf, 1.0  # a key that no query attends to
    assert attention_entropy(q, k)[0, 0].tolist() == pytest.approx([0, 0, math.log(2), math.log(3)])
    k[0, 0, 0] = -inf  # rows 0 and 1 see nothing else
    assert attention_rows(q, k).entropy[0, 0].isnan().tolist() == [True, True, False, False]


def test_scale_and_offset():
    q, k = inputs(24, 20)
    whole = attention_entropy(q, k, scale=0.7)
    assert torch.allclose(whole.double(), materialised(q, k, 0.7), atol=1e-5)
    assert torch.allclose(attention_entropy(q[:, :, 10:], k, scale=0.7, q_offset=10), whole[:, :, 10:], atol=1e-5)


def values_and_gradients(q, k, offset=0):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    rows = attention_rows(q, k, q_offset=offset)
    weights = torch.linspace(-1, 2, rows.entropy.numel(), dtype=rows.entropy.dtype).view_as(rows.entropy)
    return *rows, *torch.autograd.grad((rows.entropy * weights + rows.lse * weights.flip(2)).sum(), (q, k))


def test_tiles_change_nothing(monkeypatch):
    q, k = inputs(40, 30, dtype=torch.float64)
    whole = values_and_gradients(q[:, :, 3:], k, 3)
    for elements in (1, 100, 40 * 40, 5000):
        monkeypatch.setattr(entropy, "TILE_ELEMENTS", elements)
        for one, other in zip(whole, values_and_gradients(q[:, :, 3:], k, 3), strict=True):
            assert torch.allclose(one, other, atol=1e-10)


def test_no_map_beyond_a_tile_is_held(monkeypatch):
    """The largest tensor of scores stays within the bound, at a length whose full map is 16 times that."""
    largest, scores = [], entropy._Tiles.scores

    def watched(self, *tile):
        found = scores(self, *tile)
        largest.append(found[0].numel())
        assert self.work.numel() <= 2 << 16
        return found

    monkeypatch.setattr(entropy, "TILE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(entropy._Tiles, "scores", watched)
    values_and_gradients(*torch.randn(2, 1, 1, 1024, 4))
    assert max(largest) <= 1 << 16
    assert sum(largest) >= 1024 * 1024


def test_memory_does_not_grow_with_the_map():
    """As torch's allocator counts it, forward and backward: a map of 8192 x 8192 would take 256 MiB."""
    q, k = torch.randn(2, 1, 1, 8192, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        values_and_gradients(q, k)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 1 << 20 < largest < 16 << 20


def test_autocast_does_not_round_the_products():
    q, k = inputs(64, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (attention_entropy(q, k) - materialised(q, k, 0.25)).abs().max() < 1e-4


@pytest.mark.parametrize(("T", "keys", "offset"), [(1, 1, 0), (1, 6, 5), (7, 7, 0), (6, 14, 3)])
def test_gradcheck(T, keys, offset, monkeypatch):
    monkeypatch.setattr(entropy, "TILE_ELEMENTS", 40)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, T, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    k = torch.randn(3, 2, 2, keys, dtype=torch.float64, generator=generator, requires_grad=True)

    def strided(q, k):
        return attention_rows(q.transpose(1, 2), k.permute(2, 1, 3, 0), scale=0.8, q_offset=offset)[:2]

    assert torch.autograd.gradcheck(strided, (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [5, 500])
def test_gradients_of_random_inputs(dtype, largest):
    """Against autograd through the definition, in float64 of the same rounded inputs, relative to the largest."""
    q, k = inputs(100, largest, dtype=dtype)
    q, k = q.requires_grad_(), k.requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    for name in ("entropy", "lse"):
        found = torch.autograd.grad(getattr(attention_rows(q, k), name).sum(), (q, k))
        right = torch.autograd.grad(getattr(materialised_rows(*wide, 0.25), name).sum(), wide)
        for x, y in zip(found, right, strict=True):
            assert x.dtype == dtype
            assert (x - y).abs().max() < max(1e-3, 2 * torch.finfo(dtype).eps) * y.abs().max(), name


def test_no_gradient_reaches_a_key_that_is_not_seen():
    q, k = inputs(40, 20)
    q, k = q[:, :, :20].requires_grad_(), k.requires_grad_()
    rows = attention_rows(q, k, q_offset=5)
    (dk,) = torch.autograd.grad(rows.entropy[:, :, :4].sum() + rows.lse[:, :, :4].sum(), k)
    assert dk[:, :, 9:].eq(0).all()
    assert dk[:, :, :9].ne(0).all()


def test_the_gradient_of_a_nan_row_is_nan():
    q, k = inputs(8, 5)
    q, k = q.requires_grad_(), k.clone()
    k[0, 0, 3, 0] = float("nan")
    (dq,) = torch.autograd.grad(attention_entropy(q, k.requires_grad_()).sum(), q)
    assert dq[0, 0, 3:].isnan().any(-1).all()
    assert dq[0, 1:].isfinite().all()
    assert dq[1].isfinite().all()


def test_max_score_and_sink_have_no_gradient():
    q, k = (x.requires_grad_() for x in inputs(8, 5))
    rows = attention_rows(q, k)
    assert [x.requires_grad for x in rows] == [True, True, False, False]
    with pytest.raises(RuntimeError, match="does not require grad"):
        rows.sink.sum().backward()
    assert not attention_entropy(q.detach(), k.detach()).requires_grad


def test_differentiating_twice_is_refused():
    q, k = (x.requires_grad_() for x in inputs(8, 5))
    (dq,) = torch.autograd.grad(attention_entropy(q, k).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


@pytest.mark.parametrize("sign", [-1, 1])
def test_gradient_steps_move_the_entropy(sign):
    q, k = (x.requires_grad_() for x in inputs(32, 3))
    values = []
    for _ in range(20):
        mean = attention_entropy(q, k).mean()
        values.append(mean.item())
        with torch.no_grad():
            for x, gradient in zip((q, k), torch.autograd.grad(mean, (q, k)), strict=True):
                x += sign * 10 * gradient
    steps = torch.tensor(values).diff()
    assert (sign * steps > 0).all()
    assert abs(values[-1] - values[0]) > 0.05


def test_inside_a_compiled_graph():
    """fullgraph: a break would be an error; values and gradients as outside."""

    def loss(q, k):
        rows = attention_rows(q * 2, k, q_offset=2)
        return rows.entropy.mean() + 0.1 * rows.lse.sum(), rows.sink, rows.max_score

    q, k = (x.requires_grad_() for x in inputs(12, 5))
    q = q[:, :, :9].detach().requires_grad_()
    found, right = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k), loss(q, k)
    assert not found[1].requires_grad
    assert all(x.equal(y) for x, y in zip(found, right, strict=True))
    gradients = [torch.autograd.grad(x[0], (q, k)) for x in (found, right)]
    assert all(torch.allclose(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_well_formed(dtype):
    q, k = (x.requires_grad_() for x in inputs(6, 5, D=4, dtype=dtype))
    torch.library.opcheck(torch.ops.normfree.attention_rows.default, (q, k[:, :, :6], 0.5, 0))
    rows = torch.randn(4, 2, 3, 6).unbind()
    arguments = (*rows[:2], q.detach(), k.detach(), *rows[2:], 0.5, 0)
    torch.library.opcheck(torch.ops.normfree.attention_rows_backward.default, arguments)


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

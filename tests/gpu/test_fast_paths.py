"""The CUDA kernels of the fast paths against their contracts on the CPU: python -m pytest -m gpu tests/gpu"""

import numpy as np
import pytest
import torch

from normfree.config import IGNORED, ModelConfig
from normfree.diagnostics.census import Census
from normfree.diagnostics.hooks import Recorder, is_forward
from normfree.kernels import attention, linear, loss
from normfree.model import Transformer, init_weights
from normfree.tables import STATISTICS

pytestmark = pytest.mark.gpu


def drawn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found, wanted):
    return ((found.cpu().double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
@pytest.mark.parametrize("T", [1, 17, 64, 100, 128, 129, 333, 1024])
def test_packed_attention(T, D, dtype):
    B, H, scale = 3, 2, D**-0.5
    qkv, grad = drawn(B, T, 3 * H * D, dtype=dtype), drawn(B, T, H * D, seed=1, dtype=dtype)
    assert attention.expressible(qkv.cuda(), H)
    exact = qkv.double().requires_grad_()
    wanted, _ = attention.packed_attention(exact, H, scale)
    wanted.backward(grad.double())
    leaf = qkv.cuda().requires_grad_()
    found, nothing = attention.packed_attention(leaf, H, scale)
    assert not nothing.numel()
    found.backward(grad.cuda())
    assert error(found, wanted.detach()) < 5e-3
    if T > 1:  # a single key has no gradient but v's
        assert error(leaf.grad, exact.grad) < 1e-2
    y, rows = attention.packed_attention(leaf, H, scale, look=True)
    assert error(y.detach(), found.detach().cpu()) < 1e-3
    ours = Census.of_rows(rows)
    q, k, _ = attention._unpack(qkv, H)
    theirs = Census.take(q, k, scale, True)
    torch.testing.assert_close(ours.heads.cpu(), theirs.heads, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.entropy.cpu(), theirs.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("T", [128, 256])
def test_gradients_of_nearly_one_hot_attention_are_no_further_off_than_pytorchs(T):
    """Their rows' dS is small beside what it is the difference of: row by row, with the median and the worst tenth."""
    B, H, D = 4, 4, 64
    qkv, grad = 3.5 * drawn(B, T, 3 * H * D), drawn(B, T, H * D, seed=1)
    exact, leaf, plain = qkv.double().requires_grad_(), qkv.cuda().requires_grad_(), qkv.cuda().requires_grad_()
    attention.packed_attention(exact, H, D**-0.5)[0].backward(grad.double())
    attention.packed_attention(leaf, H, D**-0.5)[0].backward(grad.cuda())
    y = torch.nn.functional.scaled_dot_product_attention(*attention._unpack(plain, H), is_causal=True)
    y.transpose(1, 2).flatten(2).backward(grad.cuda())

    def rows(found):  # dQ of each row and head, relative
        away, size = (x[:, 1:, : H * D].unflatten(2, (H, D)).norm(dim=-1) for x in (found - exact.grad, exact.grad))
        return (away / size.clamp(min=1e-6)).quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))

    ours, theirs = (rows(x.grad.cpu().double()) for x in (leaf, plain))
    print(f"T = {T}: dQ off by {ours.tolist()} of itself, PyTorch's by {theirs.tolist()}")
    assert (ours <= 1.2 * theirs + 1e-3).all()


@pytest.mark.parametrize("T", [100, 300])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_attention_tells_of_numbers_that_are_not_finite(value, T):
    qkv = drawn(2, T, 3 * 64)
    qkv[1, T // 2, 3] = value
    q, k, _ = attention._unpack(qkv, 2)
    theirs = Census.take(q, k, 0.2, True)
    ours = Census.of_rows(attention.packed_attention(qkv.cuda(), 2, 0.2, look=True)[1])
    torch.testing.assert_close(ours.heads.cpu(), theirs.heads, rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(ours.entropy.cpu(), theirs.entropy, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("T", [100, 128, 300])
def test_scores_of_ten_thousand_million_are_no_reason_for_nan(T):
    """A norm-free model that is being lost meets them; SDPA is finite there."""
    B, H, scale = 2, 2, 0.125
    qkv, grad = 2e4 * drawn(B, T, 3 * 64 * H), drawn(B, T, 64 * H, seed=1)
    wanted, _ = attention.packed_attention(qkv.double(), H, scale)
    leaf = qkv.cuda().requires_grad_()
    found, rows = attention.packed_attention(leaf, H, scale, look=True)
    found.backward(grad.cuda())
    assert error(found.detach(), wanted) < 5e-3
    assert leaf.grad.isfinite().all()
    theirs = Census.take(*attention._unpack(qkv.double(), H)[:2], scale, True)
    torch.testing.assert_close(Census.of_rows(rows).entropy.cpu().double(), theirs.entropy.double(), rtol=0, atol=1e-4)
    q, k, _ = attention._unpack(qkv.cuda(), H)
    ours = Census.take(q, k, scale, True)
    torch.testing.assert_close(ours.entropy.cpu().double(), theirs.entropy.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("M", "K", "N"), [(1000, 96, 200), (128, 128, 128), (4096, 768, 3072), (1, 8, 16)])
def test_gradients_of_the_second_projection(M, K, N, beside):
    grad, weight, hidden = drawn(M, K), drawn(K, N, seed=1), drawn(M, N, seed=2)
    tensors = [grad, weight, hidden, drawn(M, N, seed=3) if beside else None]
    wanted = linear._projection_gradients(*(None if x is None else x.double() for x in tensors))
    found = linear._projection_gradients(*(None if x is None else x.cuda() for x in tensors))
    for ours, theirs, most in zip(found, wanted, (5e-3, 1e-3, 1e-5), strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < most


def test_a_weights_gradient_is_not_rounded():
    grad, x, weight = drawn(4096, 96), drawn(4096, 64, seed=1), drawn(96, 64, seed=2)
    grad_x, found = linear._linear_gradients(grad.cuda(), x.cuda(), weight.cuda())
    assert found.dtype == torch.float32
    assert error(found, grad.double().t() @ x.double()) < 1e-5
    assert error(grad_x, grad.double() @ weight.double()) < 5e-3


@pytest.mark.parametrize("size", [4, 1e9])
@pytest.mark.parametrize(("V", "used"), [(50304, 50304), (50304, 50257), (512, 500), (8192, 8192)])
def test_softmax_gradient(V, used, size):
    logits = size * drawn(20, V)
    targets = torch.randint(0, used, (20,), generator=torch.Generator().manual_seed(0))
    targets[3] = IGNORED
    logits[7, 100] = float("nan")
    found = logits.cuda()
    losses = loss.softmax_gradient_(found, targets.cuda(), used)
    wanted = loss.softmax_gradient_(logits, targets, used)
    torch.testing.assert_close(losses.cpu(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.cpu(), logits, rtol=1e-2, atol=1e-6, equal_nan=True)
    assert (found[3] == 0).all()


def test_the_loss_over_several_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CUDA_ROWS", 64)
    hidden, weight = drawn(200, 64), 0.3 * drawn(1024, 64, seed=1, dtype=torch.float32)
    targets = torch.arange(200)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = torch.nn.functional.cross_entropy((exact[0] @ exact[1].t())[:, :1000], targets, reduction="sum")
    wanted.backward()
    leaves = [hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()]
    total, bad = loss.linear_cross_entropy(*leaves, targets.cuda(), 1000)
    total.backward()
    assert bad == 0
    assert total.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert all(error(a.grad, b.grad) < 1e-2 for a, b in zip(leaves, exact, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize(("norm", "act"), [("none", "relu"), ("layernorm", "gelu_tanh"), ("none", "gelu")])
def test_gradients_of_a_model_are_as_near_to_the_exact_ones_as_the_plain_paths(norm, act, positions, compiled):
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 128, "vocab_size": 4096}
    config = ModelConfig(norm=norm, act=act, positions=positions, rotary_pct=0.25, **shape)
    idx = torch.randint(0, 4096, (16, 128), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def step(fast, half=True, level="off"):
        torch.compiler.reset()
        model = Transformer(config).cuda()
        init_weights(model, 0)
        recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)])
        recorder.start(1, level)
        forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half), model.fast_paths(fast):
            mean = forward(idx, idx).sum / idx.numel()
        mean.backward()
        if level != "off":
            found = recorder.unpack(recorder.stop().cpu())
            assert np.isfinite(found["attn_entropy"]).all()
            assert (found["mlp_pre_std"] > 0).all()
        return mean.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (exact, g), (plain, g_plain), (fast, g_fast) = step(False, False), step(False), step(True)
    recorded, g_recorded = step(True, level="record")
    away, as_far = ((x - g).norm() / g.norm() for x in (g_fast, g_plain))
    print(f"{norm} {act}: loss {exact:.5f}, plain {plain - exact:.1e}, fast {fast - exact:.1e}")
    print(f"{norm} {act}: gradients from the exact ones: plain {as_far:.2e}, fast {away:.2e}")
    assert abs(fast - exact) < 2 * abs(plain - exact) + 1e-3
    assert away < 1.1 * as_far
    assert abs(recorded - exact) < 2 * abs(plain - exact) + 1e-3
    assert (g_recorded - g).norm() / g.norm() < 1.1 * as_far

"""The operators of the fast paths against PyTorch's own arithmetic, on the CPU: the contract of the CUDA kernels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normfree.config import IGNORED, ModelConfig
from normfree.diagnostics import Recorder
from normfree.diagnostics.hooks import is_forward
from normfree.kernels import attention, linear
from normfree.kernels.loss import linear_cross_entropy, softmax_gradient_
from normfree.model import Transformer, init_weights
from normfree.model.activations import build_activation
from normfree.tables import STATISTICS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(output, *leaves):
    return torch.autograd.grad(output, leaves, drawn(*output.shape, seed=9))


@pytest.mark.parametrize("T", [1, 5, 16, 33])
def test_packed_attention_is_attention(T):
    B, H, D, scale = 2, 3, 16, 0.3
    qkv = drawn(B, T, 3 * H * D).requires_grad_()
    q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in qkv.split(H * D, dim=-1))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(2)
    found, _ = attention.packed_attention(qkv, H, scale)
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(gradients(found, qkv), gradients(wanted, qkv), **CLOSE)


@pytest.mark.parametrize("act", linear.ACTS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_feed_forward_is_two_layers_and_an_activation(biased, act, beta):
    x, w_1, w_2 = drawn(2, 7, 16).requires_grad_(), drawn(24, 16).requires_grad_(), drawn(16, 24).requires_grad_()
    b_1, b_2 = (drawn(24).requires_grad_(), drawn(16).requires_grad_()) if biased else (None, None)
    leaves = [t for t in (x, w_1, b_1, w_2, b_2) if t is not None]
    module = build_activation(ModelConfig(act=act, act_beta=beta))
    before = F.linear(x, w_1, b_1)
    after = module(before)
    wanted = F.linear(after, w_2, b_2)
    grads = gradients(wanted, *leaves)
    for look in (False, True):
        found, seen = linear.feed_forward(x, w_1, b_1, w_2, b_2, act, beta, look)
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(gradients(found, *leaves), grads, rtol=1e-3, atol=1e-4)
        assert (seen is not None) == look
    torch.testing.assert_close(seen, (before.detach(), after.detach()), **CLOSE)
    assert not any(each.requires_grad for each in seen)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_is_linear(biased):
    x, weight = drawn(2, 7, 16).requires_grad_(), drawn(24, 16).requires_grad_()
    bias = drawn(24).requires_grad_() if biased else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    wanted, found = F.linear(x, weight, bias), linear.linear(x, weight, bias)
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(gradients(found, *leaves), gradients(wanted, *leaves), **CLOSE)


def test_gradients_of_weights_are_not_rounded_to_half():
    grad, x = drawn(64, 8).bfloat16(), drawn(64, 8, seed=1).bfloat16()
    exact = grad.double().t() @ x.double()
    _, found = linear._linear_gradients(grad, x, drawn(8, 8, seed=2).bfloat16())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 < (found.bfloat16() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_gradient_is_that_of_each_rows_loss(dtype):
    logits = (3 * drawn(6, 40)).to(dtype)
    targets = torch.tensor([0, 39, 5, IGNORED, 7, 7])
    leaf = logits.double().requires_grad_()
    wanted = F.cross_entropy(leaf, targets, ignore_index=IGNORED, reduction="none")
    grad = torch.autograd.grad(wanted.sum(), leaf)[0]
    losses = softmax_gradient_(logits, targets, 40)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), grad, rtol=0, atol=2e-3 if dtype == torch.bfloat16 else 1e-6)


def test_loss_in_half_precision_has_float32_gradients_of_the_weight():
    hidden, weight = drawn(50, 16).bfloat16().requires_grad_(), (0.3 * drawn(64, 16, seed=1)).requires_grad_()
    targets = torch.arange(50) % 60
    total, bad = linear_cross_entropy(hidden, weight, targets, 60)
    exact = F.cross_entropy((hidden.double() @ weight.double().t())[:, :60], targets, reduction="sum")
    assert bad == 0
    assert total.item() == pytest.approx(exact.item(), rel=2e-3)
    found, wanted = (torch.autograd.grad(x, (hidden, weight)) for x in (total, exact))
    assert found[1].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("norm", ["none", "layernorm"])
@pytest.mark.parametrize("act", ["relu", "gelu_tanh"])
def test_a_models_fast_paths_change_rounding_alone(norm, act):
    model = Transformer(ModelConfig(norm=norm, act=act, n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128))
    init_weights(model, 0)
    idx = torch.arange(64).view(4, 16) % 100

    def step(fast, dtype=torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), model.fast_paths(fast):
            loss = model(idx, idx).sum / idx.numel()
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (exact, g), (plain, g_plain), (fast, g_fast) = step(False, torch.float32), step(False), step(True)
    assert fast == pytest.approx(exact, abs=max(2e-3, 2 * abs(plain - exact)))
    assert (g_fast - g).norm() < 1.5 * (g_plain - g).norm()
    assert step(False)[1].equal(g_plain)  # and switched off again, nothing is left of them
    assert not g_fast.equal(g_plain)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_a_record_takes_the_fast_path_changes_no_gradient_and_keeps_nothing_for_it(act):
    model = Transformer(
        ModelConfig(norm="none", act=act, n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128)
    )
    init_weights(model, 0)
    recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)], 16)
    called, kept = [], []
    model.blocks[0].mlp.fc.register_forward_hook(lambda *args: called.append(args))

    def keep(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    found = []
    for level in ("off", "record"):
        model.zero_grad()
        recorder.start(1, level)
        kept.append(0)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", dtype=torch.bfloat16), model.fast_paths(True), saving:
            loss = model(torch.arange(64).view(4, 16), torch.arange(64).view(4, 16)).sum
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert all(block.mlp.seen is None for block in model.blocks)
    assert (recorder.unpack(recorder.stop())["mlp_pre_std"] > 0).all()
    assert found[1].equal(found[0])
    assert kept[1] == kept[0] > 0
    assert not called


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_what_the_fast_attention_saw_is_what_diagnostics_find_themselves(monkeypatch, positions):
    monkeypatch.setattr(attention, "expressible", lambda qkv, heads: True)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 128}
    model = Transformer(ModelConfig(positions=positions, rotary_pct=0.5, **shape))
    init_weights(model, 0)
    recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)], 16)
    idx = torch.arange(64).view(4, 16) % 100
    found = []
    for fast in (False, True):
        recorder.start()
        with torch.autocast("cpu", dtype=torch.bfloat16), model.fast_paths(fast), torch.no_grad():
            model(idx, idx)
        found.append(recorder.unpack(recorder.stop()))
        assert model.blocks[0].attn.inner_attention.seen is None
    for name, plain in found[0].items():
        np.testing.assert_allclose(found[1][name], plain, rtol=2e-2, atol=2e-2, err_msg=name)


@pytest.mark.parametrize("level", ["off", "residual", "all"])
def test_what_the_fast_attention_saw_does_not_outlive_its_pass(monkeypatch, level):
    """A pass off the fast path, such as the probe's, looks for itself."""
    monkeypatch.setattr(attention, "expressible", lambda qkv, heads: True)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128))
    init_weights(model, 0)
    recorder = Recorder(model, ["attn_entropy", "nan_count"], 16)
    idx = torch.arange(64).view(4, 16) % 100
    recorder.start(1, level)
    with torch.autocast("cpu", dtype=torch.bfloat16), model.fast_paths(True), torch.no_grad():
        model(idx, idx)
    recorder.level = "off"
    recorder.start()
    with torch.no_grad():
        model(idx, idx)
    assert np.isfinite(recorder.unpack(recorder.stop())["attn_entropy"]).all()

"""Schedules, decay groups, gradient norms, clipping."""

import math

import pytest
import torch

from normfree.config import ModelConfig, OptimConfig
from normfree.model import Transformer, init_weights
from normfree.tables import SCHEDULES
from normfree.training.optimizer import build_optimizer, clip_divisor, decay_groups, gradient_norms, partly_read
from normfree.training.schedules import learning_rate


def rates(schedule, steps=100, **settings):
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=10, **settings)
    return [learning_rate(step, steps, config) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_warmup_reaches_the_peak_and_never_passes_it(schedule):
    found = rates(schedule, lr_final=0.1)
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(found) == found[10] == 2.0
    assert all(a >= b for a, b in zip(found[10:], found[11:], strict=False))
    assert found[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_closed_forms():
    assert rates("linear")[55] == pytest.approx(1.0)
    assert rates("cosine")[55] == pytest.approx(1.0)
    assert rates("cosine")[10 + 30] == pytest.approx(1 + math.cos(math.pi / 3))
    assert rates("wsd", decay_fraction=0.5)[54] == 2.0
    assert rates("wsd", decay_fraction=0.5)[10 + 68] == pytest.approx(2 * (1 - (68 / 90 - 0.5) / 0.5))


def test_a_run_without_warmup_starts_at_the_peak():
    assert learning_rate(0, 5, OptimConfig(lr=3.0, warmup_steps=0, schedule="constant")) == 3.0


def small(**settings):
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=32, **settings))
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("decay_slopes", [False, True, 0.02])
def test_decay_groups(scope, decay_slopes):
    model = small(act="learnable_leaky_relu", act_scope=scope)
    groups = decay_groups(model, OptimConfig(weight_decay=0.3, decay_slopes=decay_slopes))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        matrices = 0.3 if name.endswith(".weight") and "norm" not in name else 0.0
        slopes = 0.3 if decay_slopes is True else decay_slopes
        assert decay[id(p)] == (slopes if "slope" in name else matrices), name


def test_the_norm_and_clipping():
    model = small(norm="none")
    idx = torch.randint(0, 32, (2, 8))
    model(idx, idx).sum.backward()
    total = gradient_norms(list(model.parameters())).norm()
    everything = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert total.item() == pytest.approx(everything.norm().item(), rel=1e-6)
    assert clip_divisor(total, 2 * total.item()) == 1
    assert clip_divisor(total, total.item() / 4).item() == pytest.approx(4, rel=1e-5)


def test_clipping_inside_the_optimizer_is_clipping_before_it():
    idx = torch.randint(0, 32, (2, 8))
    found = []
    for inside in (True, False):
        model = small(norm="none")
        optimizer = build_optimizer(model, OptimConfig())
        for _ in range(3):
            optimizer.zero_grad()
            model(idx, idx).sum.backward()
            if inside:
                optimizer.found_inf = torch.zeros(())
                optimizer.grad_scale = clip_divisor(gradient_norms(list(model.parameters())).norm(), 0.1)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        found.append(torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()]))
    assert 0.02 < found[0].norm() < 0.03  # .1 (1 - .9^3) of a gradient of norm .1
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("act", "watched"), [("relu", True), ("gelu_tanh", False)])
def test_weights_before_a_relu_that_may_swallow_a_nan_are_looked_at(act, watched):
    """cuBLAS's relu epilogue does not promise to keep a NaN of fc; the other paths do."""
    model = Transformer(ModelConfig(act=act, n_layer=2, n_head=1, n_embd=8, block_size=8, vocab_size=32))
    fcs = {p.data_ptr() for block in model.blocks for p in block.mlp.fc.parameters()}
    assert fcs.isdisjoint(t.data_ptr() for t in partly_read(model))
    assert (fcs <= {t.data_ptr() for t in partly_read(model, fast=True)}) == watched

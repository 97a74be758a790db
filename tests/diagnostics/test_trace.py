"""The first non-finite value of a step is named: module, phase and tensor, in the order of execution."""

import itertools
from functools import partial

import pytest
import torch

from normfree.config import InjectConfig, ModelConfig, OptimConfig
from normfree.diagnostics.finding import Finding
from normfree.diagnostics.inject import Injector, running_modules
from normfree.diagnostics.trace import first_non_finite, trace_step
from normfree.model import Transformer, init_weights
from normfree.training.optimizer import build_optimizer

IDX = torch.arange(24).view(2, 12)
HUGE = 3e38


def build(**shape):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 64} | shape
    model = Transformer(ModelConfig(**shape))
    init_weights(model, 0)
    return model


def losses(model, number=1, factor=1.0):
    return [lambda i=i: model(IDX + i, IDX).sum * (factor / number / 24) for i in range(number)]


def trace(model, **options):
    return first_non_finite(model, losses(model), step=7, **options)


def with_moments(model):
    optimizer = build_optimizer(model, OptimConfig())
    model(IDX, IDX).sum.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"norm": "none", "positions": "rotary", "rotary_pct": 0.5, "parallel_residual": True, "tie_embeddings": False},
        {"norm": "none", "act": "learnable_leaky_relu", "act_scope": "global", "final_norm": "none", "embed_scale": 2},
    ],
    ids=["gpt2", "parallel, rotary, untied", "shared slope, no norm at all"],
)
def test_every_place_where_a_fault_can_be_planted_is_named(shape):
    model = build(n_layer=1, **shape)
    optimizer = with_moments(model)
    modules, parameters = running_modules(model), [name for name, _ in model.named_parameters()]
    places = [*itertools.product(("forward", "backward"), modules + parameters)]
    places += [("optimizer", f"{name}.{moment}") for name in parameters for moment in ("exp_avg", "exp_avg_sq")]
    places = places[:: 3 if shape else 1]  # of the first model every one
    for (phase, path), value in zip(places, itertools.cycle(("nan", "inf")), strict=False):
        injector = Injector(model, optimizer, InjectConfig(7, path, phase, value))
        finding = trace(model, optimizer=optimizer, injector=injector)
        assert finding is not None, (phase, path)
        assert (finding.phase, finding.site, finding.count, finding.value.lower()) == (phase, path, 1, value)
        assert not injector.armed
        for module in model.modules():
            module._forward_hooks.clear()


def test_a_healthy_step_has_no_finding_and_is_left_as_it_was():
    model = build()
    optimizer = with_moments(model)
    model(IDX, IDX).sum.backward()
    grads = [p.grad for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    plain = model(IDX, IDX).sum.item() / 24
    result = trace_step(model, losses(model, 2), step=0, optimizer=optimizer)
    assert result.finding is None
    assert trace_step(model, losses(model), step=0).loss == pytest.approx(plain, rel=1e-6)
    assert all(a is p.grad for a, p in zip(grads, model.parameters(), strict=True))
    assert all(a.equal(p) for a, p in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_loss_and_gradient_norm_are_those_of_the_step_whatever_the_scale():
    model = build()
    one = trace_step(model, losses(model, 2), step=0)
    scaled = trace_step(model, losses(model, 2), step=0, scale=torch.tensor(1024.0))
    for loss in losses(model, 2):
        loss().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert (one.grad_norm, scaled.grad_norm) == pytest.approx((norm, norm), rel=1e-5)
    assert one.loss == scaled.loss


@torch.no_grad()
def fill(model, **values):
    for name, value in values.items():
        model.get_parameter(name.replace("__", ".")).copy_(torch.as_tensor(value))


# What really happens, as opposed to what is planted: finite weights whose products or sums leave the range of fp32.
FORWARD, BACKWARD = "forward", "backward"
PARALLEL = {"parallel_residual": True, "norm": "none"}
SIGNS = HUGE * torch.linspace(-1, 1, 64)[:, None]
BIAS = {"blocks__0__attn__proj__bias": HUGE}
REAL = [
    ({}, {"wte__weight": HUGE, "wpe__weight": HUGE}, (FORWARD, "model", "intermediate")),
    (PARALLEL, BIAS | {"blocks__0__mlp__proj__bias": HUGE}, (FORWARD, "blocks.0", "output")),
    ({"norm": "none"}, BIAS | {"wpe__weight": HUGE, "blocks__0__attn__qkv__weight": 0.0},
     (FORWARD, "blocks.0", "intermediate")),
    ({}, {"blocks__1__mlp__fc__weight": 1e38, "blocks__1__norm_2__bias": 10.0}, (FORWARD, "blocks.1.mlp.fc", "output")),
    ({}, {"blocks__0__attn__qkv__bias_qk": 1e30}, (FORWARD, "blocks.0.attn.inner_attention", "output")),
    ({"tie_embeddings": False}, {"final_norm__bias": 1e30, "lm_head__weight": 1e30}, (FORWARD, "loss", "loss")),
    ({"tie_embeddings": False}, {"lm_head__weight": float("inf")}, (FORWARD, "lm_head", "weight")),
    ({}, {"wpe__weight": float("nan")}, (FORWARD, "wpe", "weight")),
    ({}, {"blocks__1__mlp__fc__weight": 0.0, "blocks__1__mlp__fc__bias": 0.0, "blocks__1__mlp__proj__weight": HUGE},
     (BACKWARD, "blocks.1.mlp.proj", "gradient")),
    ({"tie_embeddings": False}, {"final_norm__weight": 0.0, "lm_head__weight": SIGNS},
     (BACKWARD, "loss", "gradient")),
    ({"tie_embeddings": False, "embed_scale": 1e38, "positions": "rotary", "rotary_pct": 0.5}, {"wte__weight": 0.0},
     (BACKWARD, "model", "gradient")),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "weights", "place"), REAL, ids=["/".join(case[2]) for case in REAL])
def test_a_real_overflow_is_named(shape, weights, place):
    model = build(**shape)
    fill(model, **weights)
    finding = first_non_finite(model, losses(model, factor=1e4), step=7)
    assert finding is not None
    assert finding.place == place


def test_the_micro_batch_and_the_element_are_named():
    model = build(tie_embeddings=False, embed_scale=10.0)
    with torch.no_grad():
        model.wte.weight[24, 5] = HUGE  # the second micro-batch alone has this token
    finding = first_non_finite(model, losses(model, 2), step=7)
    assert finding is not None
    assert (finding.micro_batch, finding.module, finding.tensor) == (1, "model", "intermediate")
    assert (finding.count, finding.elements, finding.index) == (1, 2 * 12 * 16, (1, 11, 5))


def test_a_row_that_no_token_uses_is_found():
    model = build(tie_embeddings=False)
    with torch.no_grad():
        model.wte.weight[63, 2] = float("-inf")
    finding = trace(model)
    assert (finding.site, finding.value, finding.index) == ("wte.weight", "-Inf", (63, 2))


def test_in_words():
    model = build()
    fill(model, blocks__1__mlp__fc__weight=1e38, blocks__1__norm_2__bias=10.0)
    words = trace(model).words()
    assert words.startswith("blocks.1.mlp.fc turned inputs up to 1")
    assert "into 1,536 Inf of 1,536 outputs (step 7, forward, micro-batch 0)" in words


@pytest.mark.parametrize("tensor", ["output", "intermediate", "loss", "gradient", "weight", "weight.grad"])
def test_a_finding_survives_json(tensor):
    phase = "backward" if "grad" in tensor else "forward"
    finding = Finding(7, 0, phase, "blocks.0", tensor, "NaN", 1, 2, 30, (1, 2), None, 3.0)
    assert Finding.from_dict(finding.to_dict()) == finding
    assert "blocks.0" in finding.words() or tensor == "loss"


def test_a_trace_that_fails_takes_its_hooks_off():
    model = build()

    def broken(model):
        model(IDX, IDX)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        first_non_finite(model, [partial(broken, model)], step=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

"""Statistics of gradients, weights and updates: put together by layer, against plain torch."""

import pytest
import torch

from normfree.config import ModelConfig
from normfree.diagnostics import STATISTICS
from normfree.diagnostics.hooks import is_forward
from normfree.diagnostics.parameters import ParameterRecorder
from normfree.model import Transformer, init_weights

LAYERS = 2
OF_PARAMETERS = [name for name in STATISTICS if not is_forward(name)]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def model():
    shape = {"n_layer": LAYERS, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 64, "norm": "none"}
    model = Transformer(ModelConfig(**shape))
    init_weights(model, 0)
    return model


def layer_of(name):
    return int(name.split(".")[1]) if name.startswith("blocks.") else LAYERS


def parameter_arrays(model, change):
    """The arrays of a step that calls `change`; the gradients are those that the parameters hold."""
    recorder = ParameterRecorder(model, OF_PARAMETERS)
    norms = torch.stack([p.grad.norm() for p in recorder.parameters])
    peaks = torch.stack([p.detach().abs().amax() for p in recorder.parameters])
    parts = recorder.before_update(norms, peaks)
    with torch.no_grad():
        change()
    flat = torch.cat(parts + recorder.after_update())
    assert flat.numel() == recorder.size()
    return recorder.unpack(flat)


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def draw_gradients(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_norms_are_those_of_each_block(model):
    draw_gradients(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arrays = parameter_arrays(model, lambda: [p.sub_(0.1 * p.grad.abs()) for p in model.parameters()])
    for layer in range(LAYERS):
        inside = [(p, before[name]) for name, p in model.named_parameters() if layer_of(name) == layer]
        assert arrays["grad_norm"][layer] == pytest.approx(norm([p.grad for p, _ in inside]), rel=1e-5)
        updates = [p.detach() - old for p, old in inside]
        assert arrays["update_norm"][layer] == pytest.approx(norm(updates), rel=1e-5)
    assert arrays["grad_norm"].shape == arrays["update_norm"].shape == (LAYERS,)
    assert not any(arrays[name].any() for name in OF_PARAMETERS if name.endswith("_count"))


def test_a_step_that_changes_nothing_has_an_update_of_zero(model):
    draw_gradients(model)
    assert (parameter_arrays(model, lambda: None)["update_norm"] == 0).all()


@pytest.mark.parametrize(
    "name", ["wte.weight", "blocks.0.attn.qkv.bias_v", "blocks.1.mlp.fc.weight", "final_norm.bias"]
)
@pytest.mark.parametrize("of", ["grad", "param"])
def test_bad_gradients_and_weights_are_counted_by_layer_and_outside(model, name, of):
    draw_gradients(model)
    parameter = model.get_parameter(name)
    tensor = parameter.grad if of == "grad" else parameter.data
    tensor.view(-1)[:4] = torch.tensor([NAN, -INF, NAN, NAN])
    arrays = parameter_arrays(model, lambda: None)
    for counted in [count for count in OF_PARAMETERS if count.endswith("_count")]:
        expected = [0] * (LAYERS + 1)
        if counted.startswith(of):
            expected[layer_of(name)] = 3 if "nan" in counted else 1
        assert arrays[counted].tolist() == expected, counted


def test_gradients_whose_norm_overflows_are_not_counted_as_infinite(model):
    draw_gradients(model)
    model.wte.weight.grad.fill_(3e38)
    arrays = parameter_arrays(model, lambda: None)
    assert not arrays["grad_inf_count"].any()

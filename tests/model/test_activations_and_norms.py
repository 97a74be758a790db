"""Closed forms and identities of the swap points."""

import math

import pytest
import torch

from normfree.config import ModelConfig
from normfree.errors import UserError
from normfree.model import ACTIVATIONS, NORMS, Transformer, init_weights
from normfree.model.activations import build_activation

SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 16}
X = torch.linspace(-6, 6, 241, dtype=torch.float64)
PHI = 0.5 * (1 + torch.erf(X / math.sqrt(2)))
TANH = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)))
CLOSED_FORMS = {
    "gelu": X * PHI,
    "gelu_tanh": X * TANH,
    "relu": X.clamp(min=0),
    "relu2": X.clamp(min=0) ** 2,
    "silu": X / (1 + (-X).exp()),
    "identity": X,
    "leaky_relu": torch.where(X >= 0, X, 0.2 * X),
    "learnable_leaky_relu": torch.where(X >= 0, X, 0.2 * X),
}


def activation(name, **keys):
    return build_activation(ModelConfig(act=name, act_slope=0.2, **keys)).double()


def test_every_activation_has_a_closed_form_here():
    assert set(ACTIVATIONS) == set(CLOSED_FORMS)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_activations_are_what_they_say(name):
    torch.testing.assert_close(activation(name)(X), CLOSED_FORMS[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "learnable_leaky_relu", "identity"])
@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_homogeneous_activations_do_not_see_beta(name, beta):
    torch.testing.assert_close(activation(name, act_beta=beta)(X), CLOSED_FORMS[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_beta_leads_from_a_line_to_relu(name):
    relu = CLOSED_FORMS["relu"]
    torch.testing.assert_close(activation(name, act_beta=1e4)(X), relu, rtol=0, atol=1e-4)
    torch.testing.assert_close(activation(name, act_beta=1e-4)(X), X / 2, rtol=0, atol=1e-2)
    assert (activation(name, act_beta=2.0)(X) - activation(name)(X)).abs().max() > 0.01  # not by doing nothing
    expected = activation(name)(1.5 * X) / 1.5
    torch.testing.assert_close(activation(name, act_beta=1.5)(X), expected)


def test_the_slope_is_learned_and_may_take_either_sign():
    act = activation("learnable_leaky_relu")
    act(X).sum().backward()
    assert act.slope.grad.item() == pytest.approx(X.clamp(max=0).sum().item())
    with torch.no_grad():
        act.slope.fill_(-0.5)
    torch.testing.assert_close(act(X), torch.where(X >= 0, X, -0.5 * X))


def test_a_global_slope_is_one_parameter_of_all_blocks():
    shared = Transformer(ModelConfig(**SHAPE, act="learnable_leaky_relu", act_scope="global"))
    slopes = [block.mlp.act.slope for block in shared.blocks]
    assert all(slope is slopes[0] for slope in slopes)
    assert [name for name, _ in shared.named_parameters() if "slope" in name] == ["act.slope"]
    assert shared.slopes().shape == (1,)
    apart = Transformer(ModelConfig(**SHAPE, act="learnable_leaky_relu"))
    assert len({id(block.mlp.act.slope) for block in apart.blocks}) == 3
    assert apart.slopes().shape == (3,)
    assert Transformer(ModelConfig(**SHAPE)).slopes() is None


def test_the_gradient_of_a_global_slope_is_the_sum_over_blocks():
    idx = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
    models = [
        Transformer(ModelConfig(**SHAPE, act="learnable_leaky_relu", act_scope=s)) for s in ("global", "per_layer")
    ]
    gradients = []
    for model in models:
        init_weights(model, 1)
        model(idx, idx).sum.backward()
        gradients.append(sum(p.grad for name, p in model.named_parameters() if "slope" in name))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_every_choice_trains_and_no_parameter_is_a_scalar(norm, act, beta):
    """0-d parameters cannot be sharded."""
    model = Transformer(ModelConfig(**SHAPE, norm=norm, act=act, act_beta=beta))
    init_weights(model, 1)
    idx = torch.arange(12).view(2, 6)
    loss = model(idx, idx.roll(-1, dims=1))
    (loss.sum / loss.count).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dim() > 0, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_unknown_choice_lists_the_choices():
    for keys in ({"norm": "layer_norm"}, {"act": "gelo"}, {"final_norm": "batchnorm"}, {"loss": "hinge"}):
        with pytest.raises(UserError, match="unknown .* Choose from"):
            Transformer(ModelConfig(**(SHAPE | keys)))


# ----------------------------------------------------------------------------------------------------------------------


def statistics(x):
    x = x.double()
    return x, x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False), x.pow(2).mean(-1, keepdim=True)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norms_are_what_they_say(eps):
    x = 3 + 2 * torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    gain, bias = torch.linspace(0.5, 2, 16), torch.linspace(-1, 1, 16)
    exact, mean, variance, square = statistics(x)
    expected = {
        "layernorm": gain * (exact - mean) / (variance + eps).sqrt() + bias,
        "rmsnorm": gain * exact / (square + eps).sqrt(),
        "none": exact,
    }
    assert set(expected) == set(NORMS)
    for name, value in expected.items():
        norm = NORMS[name](16, eps)
        parameters = dict(norm.named_parameters())
        with torch.no_grad():
            for suffix, start in (("weight", gain), ("bias", bias)):
                if suffix in parameters:
                    parameters[suffix].copy_(start)
        torch.testing.assert_close(norm(x).double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_statistics_are_taken_in_fp32(name):
    """The squares of these fp16 numbers overflow in fp16; the norm of them does not."""
    x = torch.tensor([[300.0, -300.0, 600.0, -600.0]], dtype=torch.float16)
    y = NORMS[name](4, 1e-5)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, (x.float() / x.float().pow(2).mean().sqrt()).half())


def test_the_absence_of_a_norm_is_an_identity():
    norm = NORMS["none"](8, 1e-5)
    x = torch.randn(2, 8)
    assert isinstance(norm, torch.nn.Identity)
    assert norm(x) is x
    assert not list(norm.parameters())


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_norms_of_a_model_that_was_made_half_compute_in_fp32(name):
    """`load_model(run).to(torch.bfloat16)`: weights of another dtype than the fp32 that statistics are taken in."""
    norm = NORMS[name](16, 1e-5)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    wanted = norm(x.bfloat16())
    assert torch.equal(norm.to(torch.bfloat16)(x.bfloat16()), wanted)
    assert norm.double()(x.double()).dtype == torch.float64

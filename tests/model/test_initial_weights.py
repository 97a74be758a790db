"""The table in the docstring of `init_weights`, tensor by tensor."""

import math
from itertools import combinations

import pytest
import torch

from normfree.config import BiasConfig, InitConfig, ModelConfig
from normfree.model import Transformer, init_weights

SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 50, "vocab_size": 200}
VARIANTS = {
    "gpt2": {},
    "normfree": {"norm": "none"},
    "rmsnorm": {"norm": "rmsnorm"},
    "relu": {"act": "relu"},
    "slopes": {"act": "learnable_leaky_relu"},
    "pythia": {"positions": "rotary", "parallel_residual": True, "tie_embeddings": False},
    "no biases": {"bias": BiasConfig(False, False, False, False, False)},
    "more blocks": {"n_layer": 5},
}


def build(seed=1, **keys):
    model = Transformer(ModelConfig(**(SHAPE | keys)))
    init_weights(model, seed)
    return model


def expected_std(name, std, n_layer, depth_scaled):
    """None where the tensor is not drawn."""
    module = name.rsplit(".", 1)[0]
    if "norm" in name or "bias" in name or "slope" in name:
        return None
    writes = module.endswith(("attn.proj", "mlp.proj"))
    return std / math.sqrt(2 * n_layer) if writes and depth_scaled else std


@pytest.mark.parametrize("depth_scaled", [True, False])
@pytest.mark.parametrize("family", [{}, VARIANTS["pythia"]])
def test_every_tensor_has_the_distribution_of_the_table(family, depth_scaled):
    model = build(**family, act="learnable_leaky_relu", act_slope=0.3, init=InitConfig(0.05, depth_scaled))
    for name, parameter in model.named_parameters():
        std = expected_std(name, 0.05, 3, depth_scaled)
        if std is None:
            value = 0.3 if "slope" in name else 0.0 if "bias" in name else 1.0
            assert (parameter == torch.full_like(parameter, value)).all(), name
        else:
            n = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * n), name  # five standard errors
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name
            excess = (parameter / std).pow(4).mean().item() - 3  # of a normal distribution: 0
            assert abs(excess) < 5 * math.sqrt(96 / n), name


def test_no_two_tensors_are_alike():
    drawn = [
        p.flatten()[:32] for name, p in build().named_parameters() if name.endswith("weight") and "norm" not in name
    ]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.8


def test_variants_start_with_the_same_bits_in_every_tensor_that_they_share():
    models = {
        name: dict(build(**keys, init=InitConfig(depth_scaled=False)).named_parameters())
        for name, keys in VARIANTS.items()
    }
    for (first, a), (second, b) in combinations(models.items(), 2):
        shared = a.keys() & b.keys()
        assert len([name for name in shared if name.startswith("blocks.")]) >= 12
        for name in shared:
            assert torch.equal(a[name], b[name]), f"{name} of {first} and {second}"


def test_the_seed_decides_and_nothing_else():
    a, again, other = build(seed=1), build(seed=1), build(seed=2)
    before = torch.get_rng_state()
    torch.manual_seed(99)
    after_other_draws = build(seed=1)
    torch.set_rng_state(before)
    for (name, x), y, z, w in zip(
        a.named_parameters(), again.parameters(), after_other_draws.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
        if expected_std(name, 1, 1, False):
            assert not torch.equal(x, w), name


def test_initialisation_leaves_the_random_state_alone():
    model = Transformer(ModelConfig(**SHAPE))
    before = torch.get_rng_state()
    init_weights(model, 1)
    assert torch.equal(torch.get_rng_state(), before)

"""Initial weights, in one place."""

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normfree.model.attention import QKVLinear

if TYPE_CHECKING:
    from normfree.model.transformer import Transformer

RESIDUAL_WRITERS = ("attn.proj", "mlp.proj")


def draw_normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Standard normal fp32 values that depend on the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def init_weights(model: "Transformer", seed: int) -> None:
    """Draw every matrix of a `Transformer` in place.

    | tensor                                     | distribution                                              |
    |--------------------------------------------|-----------------------------------------------------------|
    | wte, wpe, lm_head                          | N(0, std^2)                                               |
    | attn.qkv, mlp.fc                           | N(0, std^2)                                               |
    | attn.proj, mlp.proj                        | N(0, std^2 / (2 n_layer)) where depth_scaled (GPT-2, 2.3), |
    |                                            | else N(0, std^2), as in ReLU's Revival                    |
    | biases                                     | 0                                                         |
    | gains and biases of norms, learned slopes  | as their class sets them (1, 0, act_slope)                |

    std is `init.std`; by default sqrt(2 / (5 n_embd)), "small init" (Nguyen and Salazar, arXiv:1910.05895), as in
    Pythia: .023 at GPT-2's width of 768, where GPT-2 has .02. With .02 a narrow norm-free model starts as so near an
    identity that it does not learn.

    Values are drawn per tensor name from (seed, name), so two variants start with the same bits in every tensor that
    they share.
    """
    config = model.config
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | QKVLinear):
            continue
        std = config.init.std
        assert std is not None, "Transformer resolves its configuration"
        if config.init.depth_scaled and name.endswith(RESIDUAL_WRITERS):
            std /= math.sqrt(2 * config.n_layer)
        for suffix, parameter in module.named_parameters(recurse=False):
            if suffix == "weight":
                parameter.copy_(std * draw_normal(f"{name}.{suffix}", parameter.shape, seed))
            else:
                parameter.zero_()

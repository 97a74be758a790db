"""The feed-forward sublayer."""

from torch import Tensor, nn

from normfree.config import ModelConfig
from normfree.kernels import autocast_dtype
from normfree.kernels import linear as kernel
from normfree.model.linear import Linear


class MLP(nn.Module):
    """proj(act(fc(x))): (B, T, C) -> (B, T, C). `act` may be shared with other blocks.

    On the fast path an activation that can do so runs inside the matrix products or beside them, unless `open`: then
    fc, act and proj are called, and what lies between them can be seen.
    """

    def __init__(self, config: ModelConfig, act: nn.Module) -> None:
        super().__init__()
        assert config.n_inner is not None
        self.fast, self.open = False, False
        self.fc = Linear(config.n_embd, config.n_inner, bias=config.bias.mlp_fc)
        self.act = act
        self.proj = Linear(config.n_inner, config.n_embd, bias=config.bias.mlp_proj)
        aligned = config.n_embd % 8 == 0 and config.n_inner % 8 == 0
        self.act_inside = config.act if config.act in kernel.ACTS and aligned else None
        self.act_beta = config.act_beta

    def forward(self, x: Tensor) -> Tensor:
        half = autocast_dtype(x)
        if self.fast and not self.open and self.act_inside is not None and half is not None:
            fc, proj = self.fc, self.proj
            weights = fc.weight, fc.bias, proj.weight, proj.bias
            return kernel.feed_forward(x.to(half), *weights, self.act_inside, self.act_beta)
        return self.proj(self.act(self.fc(x)))

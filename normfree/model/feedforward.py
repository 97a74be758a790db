"""The feed-forward sublayer."""

from torch import Tensor, nn

from normfree.config import ModelConfig
from normfree.kernels import autocast_dtype
from normfree.kernels import linear as kernel
from normfree.model.linear import Linear


class MLP(nn.Module):
    """proj(act(fc(x))): (B, T, C) -> (B, T, C). `act` may be shared with other blocks.

    On the fast path an activation that can do so runs inside the matrix products or beside them, and fc, act and proj
    are not called.
    """

    def __init__(self, config: ModelConfig, act: nn.Module) -> None:
        super().__init__()
        assert config.n_inner is not None
        self.fast = False
        self.look = False  # whether diagnostics want what lies before and after the activation,
        self.seen: tuple[Tensor, Tensor] | None = None  # and that, (B, T, n_inner) each, until they take it
        self.fc = Linear(config.n_embd, config.n_inner, bias=config.bias.mlp_fc)
        self.act = act
        self.proj = Linear(config.n_inner, config.n_embd, bias=config.bias.mlp_proj)
        aligned = config.n_embd % 8 == 0 and config.n_inner % 8 == 0
        self.act_inside = config.act if config.act in kernel.ACTS and aligned else None
        self.act_beta = config.act_beta

    def forward(self, x: Tensor) -> Tensor:
        half = autocast_dtype(x)
        if self.fast and self.act_inside is not None and half is not None:
            fc, proj = self.fc, self.proj
            weights = fc.weight, fc.bias, proj.weight, proj.bias
            y, seen = kernel.feed_forward(x.to(half), *weights, self.act_inside, self.act_beta, self.look)
        else:
            before = self.fc(x)
            after = self.act(before)
            y, seen = self.proj(after), (before, after)
        if self.look:
            self.seen = seen
        return y

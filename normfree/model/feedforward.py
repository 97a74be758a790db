"""The feed-forward sublayer."""

from torch import Tensor, nn

from normfree.config import ModelConfig


class MLP(nn.Module):
    """proj(act(fc(x))): (B, T, C) -> (B, T, C). `act` may be shared with other blocks."""

    def __init__(self, config: ModelConfig, act: nn.Module) -> None:
        super().__init__()
        assert config.n_inner is not None
        self.fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias.mlp_fc)
        self.act = act
        self.proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias.mlp_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.fc(x)))

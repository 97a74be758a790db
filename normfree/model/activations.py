"""Activations of the feed-forward layer: `Activation(config)` maps any shape to the same shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.config import ModelConfig
from normfree.tables import ACTIVATIONS


class Activation(nn.Module):
    """An activation without parameters ignores the configuration."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()


class GELU(Activation):
    """x * Phi(x), exact (Hendrycks and Gimpel, arXiv:1606.08415): Pythia's, and the papers'."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class GELUTanh(Activation):
    """GELU by the tanh approximation: GPT-2's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class ReLU(Activation):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class ReLUSquared(Activation):
    """max(x, 0)^2 (Primer: So et al., arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SiLU(Activation):
    """x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Identity(Activation):
    """No activation: the papers' softmax-only model."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class LeakyReLU(Activation):
    """x where x >= 0, else act_slope * x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.slope = config.act_slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)


class LearnableLeakyReLU(Activation):
    """Leaky ReLU whose slope is learned, of either sign, starting at act_slope (ReLU's Revival, arXiv:2410.09637)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.slope = nn.Parameter(torch.full((1,), config.act_slope))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, self.slope.to(x.dtype) * x)


class Scaled(nn.Module):
    """act(beta * x) / beta: the same activation at another scale of its input."""

    def __init__(self, act: nn.Module, beta: float) -> None:
        super().__init__()
        self.act = act
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.beta * x) / self.beta


def build_activation(config: ModelConfig) -> nn.Module:
    """The activation that `config` names, at its input scale."""
    act = ACTIVATIONS[config.act](config)
    return act if config.act_beta == 1.0 else Scaled(act, config.act_beta)

"""Norms: `Norm(dim, eps)` maps (..., dim) to (..., dim). Statistics are taken in fp32, whatever the input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """g * (x - mean) / sqrt(var + eps) + b, with the population variance (Ba et al., arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()  # no copy, but in a model that was made half
        return F.layer_norm(x.float(), self.weight.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """g * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv:1910.07467), eps inside the root."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class NoNorm(nn.Identity):
    """The absence of a norm: no parameters, nothing computed."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()

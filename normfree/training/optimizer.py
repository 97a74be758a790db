"""AdamW with decay groups, gradient norms and clipping. Nothing here waits for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normfree.config import OptimConfig


def decays(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    """Matrices and embeddings decay; gains and biases never do, learned slopes only as the original did."""
    if name.endswith("act.slope"):
        return config.decay_slopes
    return parameter.ndim >= 2


def decay_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Optimizer groups; a parameter that several modules share is in one of them once."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if decays(name, p, config)]
    others = [p for name, p in named if not decays(name, p, config)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW: it takes a device flag, `found_inf`, that masks weights, moments and step count alike."""
    return torch.optim.AdamW(
        decay_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class GradientNorms:
    """Norms of the gradients: of each block, and of all parameters together."""

    def __init__(self, model: nn.Module, n_layer: int) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        layers = [int(name.split(".")[1]) if name.startswith("blocks.") else n_layer for name, _ in named]
        device = self.parameters[0].device
        self.layers = torch.tensor(layers, device=device)
        self.n_layer = n_layer

    def __call__(self) -> tuple[Tensor, Tensor]:
        """(total 0-d, by layer (n_layer,)); a shared slope belongs to no layer."""
        grads = [p.grad for p in self.parameters]
        assert all(g is not None for g in grads), "a parameter took no part in the step"
        norms = torch.stack(torch._foreach_norm(grads)).float()  # type: ignore[arg-type]
        squares = torch.zeros(self.n_layer + 1, device=norms.device).index_add_(0, self.layers, norms.square())
        return norms.norm(), squares[: self.n_layer].sqrt()


def clip_(parameters: Iterable[Tensor], total_norm: Tensor, largest: float) -> None:
    """Scale all gradients in place so that their joint norm is at most `largest`."""
    factor = (largest / (total_norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

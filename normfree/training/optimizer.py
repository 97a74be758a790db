"""AdamW with decay groups, gradient norms and clipping. Nothing here waits for the device."""

import torch
from torch import Tensor, nn

from normfree.config import OptimConfig
from normfree.model import Transformer
from normfree.model.feedforward import MLP


def decay_of(name: str, parameter: Tensor, config: OptimConfig) -> float:
    """Matrices and embeddings decay; gains and biases never do, learned slopes where the configuration says so."""
    if name.endswith("act.slope") and config.decay_slopes is not True:
        return float(config.decay_slopes)
    return config.weight_decay if parameter.ndim >= 2 or name.endswith("act.slope") else 0.0


def decay_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Optimizer groups, one a decay, the matrices' first; a parameter that several modules share is in one of them."""
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(decay_of(name, parameter, config), []).append(parameter)
    return [{"params": found, "weight_decay": decay} for decay, found in groups.items() if found]


class OneKernelAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` on CUDA, float32, with one kernel a group: `kernels.adamw_triton`.

    State, device flag and divisor are the same, so that a run may go on with the other one.
    """

    found_inf: Tensor  # 0-d: where it is 1, weights, moments and step count stay
    grad_scale: Tensor  # 0-d: gradients are divided by it, as they are read

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        from normfree.kernels.adamw_triton import adamw_

        assert closure is None
        divisor = getattr(self, "grad_scale", torch.ones_like(self.found_inf))
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            params, grads, firsts, seconds, _, steps = lists
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            adamw_(params, grads, firsts, seconds, steps, mask=self.found_inf, divisor=divisor, **settings)


def build_optimizer(model: nn.Module, config: OptimConfig, fast: bool = False) -> torch.optim.AdamW:
    """Fused AdamW: it takes a device flag, `found_inf`, that masks weights, moments and step count alike."""
    chosen = OneKernelAdamW if fast else torch.optim.AdamW
    return chosen(
        decay_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, each once."""
    return [p for p in model.parameters() if p.requires_grad]


def gradient_norms(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of each gradient, (parameters,) float32; NaN or Inf where it has one, or where its square overflows."""
    grads = [p.grad for p in parameters]
    assert all(g is not None for g in grads), "a parameter took no part in the step"
    return torch.stack(torch._foreach_norm(grads)).float()  # type: ignore[arg-type]


def partly_read(model: Transformer, fast: bool = False) -> list[Tensor]:
    """The weights whose NaN or Inf may not reach the loss: of position and untied token embeddings a step leaves rows
    unread, and on the `fast` path fc's relu is cuBLAS's, which does not promise to keep a NaN.

    A NaN or Inf in another weight reaches the loss, so that these are what is left to look at. Two things hide it, both
    of -Inf: a bias before a ReLU, and keys whose every score becomes -Inf. `param_inf_count` and checkpoints see those.
    """
    tables = [model.wpe.weight] if model.wpe is not None else []
    if model.lm_head is not None:
        tables.append(model.wte.weight)
    if fast:
        fcs = [module.fc for module in model.modules() if isinstance(module, MLP) and module.act_inside == "relu"]
        tables += [parameter for fc in fcs for parameter in fc.parameters()]
    return [table.detach() for table in tables]


def peaks(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude of each tensor, (tensors,); NaN where it has one."""
    return torch.stack(torch._foreach_norm(tensors, float("inf")))


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if t.ndim]


def clip_divisor(total_norm: Tensor, largest: float) -> Tensor:
    """What gradients are divided by so that their joint norm is at most `largest`, 0-d and at least 1.

    Fused AdamW divides by its `grad_scale` as it reads them: clipping needs no pass of its own.
    """
    return ((total_norm + 1e-6) / largest).clamp(min=1.0)

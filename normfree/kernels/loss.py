"""Cross-entropy from hidden states and the head's matrix, a few rows of logits at a time.

The gradient of a row's loss is softmax - one-hot, taken while its logits are at hand: the logits never exist at once,
and nothing is computed twice. Liger Kernel (Hsu et al., arXiv:2410.10989) does the same on GPUs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.config import IGNORED

CPU_LOGITS = 1 << 21  # logits held at a time on the CPU: 8 MiB, which stay in the cache
CUDA_ROWS = 16384  # half of them cost 3 % more, twice as many save nothing; 1.5 GiB of logits at 50 304 tokens


def softmax_gradient_(logits: Tensor, targets: Tensor, used: int) -> Tensor:
    """logits (R, V) become softmax - one-hot in place, 0 where the target is `IGNORED`, 0 from column `used` on.

    Returns the losses, (R,), nats, fp32: 0 where the target is ignored.
    """
    if logits.is_cuda:
        from normfree.kernels import loss_triton

        return loss_triton.softmax_gradient_(logits, targets, used, IGNORED)
    logits[:, used:] = float("-inf")
    kept = (targets != IGNORED)[:, None]  # (R, 1)
    index = targets.clamp(min=0)[:, None]
    work = logits if logits.dtype == torch.float32 else logits.float()
    top = work.amax(-1, keepdim=True)
    right = work.gather(1, index) - top
    exp = work.sub_(top).exp_()
    normalizer = exp.sum(-1, keepdim=True)
    losses = torch.where(kept, normalizer.log() - right, 0.0)
    grad = exp.mul_(kept / normalizer)
    grad.scatter_add_(1, index, -kept.to(grad.dtype))
    if grad is not logits:
        logits.copy_(grad)
    return losses[:, 0]


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total is float32 and a and b may be half precision, without rounding the product to it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@torch.library.custom_op("normfree::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, used: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        half = weight.to(hidden.dtype)  # (V, C)
        rows = CUDA_ROWS if hidden.is_cuda else max(1, CPU_LOGITS // weight.size(0))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        bad = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradient else hidden.new_empty(0)
        grad_weight = torch.zeros_like(weight) if with_gradient else weight.new_empty(0)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], half)  # (R, V)
            losses = softmax_gradient_(logits, targets[part], used)
            total += losses.sum()
            bad += (~losses.isfinite()).sum()
            if with_gradient:
                torch.mm(logits, half, out=grad_hidden[part])
                _add_product_(grad_weight, logits.t(), hidden[part])
        return total, bad, grad_hidden, grad_weight


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, used: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.float32)
    bad = hidden.new_empty((), dtype=torch.int64)
    if with_gradient:
        return total, bad, torch.empty_like(hidden), torch.empty_like(weight)
    return total, bad, hidden.new_empty(0), weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *unused: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    grad_hidden, grad_weight = ctx.saved_tensors
    return (grad * grad_hidden).to(grad_hidden.dtype), grad * grad_weight, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses in nats, fp32, and how many of its terms are not finite: both 0-d.

    hidden (N, C) in the precision of the products, weight (V, C) float32, targets (N,) with `IGNORED` where there is
    none; of the V logits the first `used` take part. Differentiable once in hidden and weight.
    """
    total, bad, _, _ = _linear_cross_entropy(hidden, weight, targets, used, torch.is_grad_enabled())
    return total, bad

"""Training losses: from the final hidden states and the head's matrix, so that logits need not exist."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.config import IGNORED

CHUNK_LOGITS = 1 << 21  # logits held at a time on the CPU: 8 MiB, which stay in the cache


class LossOutput(NamedTuple):
    """`sum` of the losses of `count` targets, in nats, fp32; `bad_rows` of them are NaN or Inf. All 0-d."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # the field hides tuple.count, which nobody calls on a loss
    bad_rows: Tensor


def head_logits(hidden: Tensor, weight: Tensor, vocab_used: int) -> Tensor:
    """(..., C) and (V, C) -> (..., V). Rows that pad the vocabulary get -inf: they take no probability."""
    logits = F.linear(hidden, weight)
    if vocab_used < weight.size(0):
        logits[..., vocab_used:] = float("-inf")
    return logits


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses, a few rows of logits at a time; their gradient is taken while they are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_used: int) -> tuple[Tensor, Tensor]:
        """hidden (N, C), weight (V, C), targets (N,) -> the sum and how many of its terms are not finite, both 0-d"""
        wanted = any(ctx.needs_input_grad[:2])
        grad_hidden, grad_weight = [], torch.zeros_like(weight) if wanted else None
        total = hidden.new_zeros(())
        bad = torch.zeros((), dtype=torch.int64, device=hidden.device)
        rows = max(1, CHUNK_LOGITS // weight.size(0))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = head_logits(hidden[part], weight, vocab_used)  # (R, V)
            kept = (targets[part] != IGNORED)[:, None]  # (R, 1)
            index = targets[part].clamp(min=0)[:, None]
            top = logits.amax(-1, keepdim=True)
            right = logits.gather(1, index) - top
            exp = logits.sub_(top).exp_()
            normalizer = exp.sum(-1, keepdim=True)
            losses = torch.where(kept, normalizer.log() - right, 0.0)
            total += losses.sum()
            bad += (~losses.isfinite()).sum()
            if grad_weight is not None:
                grad = exp.mul_(kept / normalizer)  # softmax, then minus one-hot: the gradient of each row's loss
                grad.scatter_add_(1, index, -kept.to(grad.dtype))
                grad_hidden.append(grad @ weight)
                grad_weight.addmm_(grad.t(), hidden[part])
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        ctx.mark_non_differentiable(bad)
        return total, bad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grads[0] * grad_hidden, grads[0] * grad_weight, None, None


class CrossEntropy:
    """Negative log-likelihood of the targets.

    On the CPU in fp32 the logits are never held at once: half the memory and two thirds of the time, and the same
    numbers to rounding.
    """

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_used: int) -> LossOutput:
        """hidden (B, T, C), weight (V, C), targets (B, T) with `IGNORED` where there is none."""
        count = (targets != IGNORED).sum()
        flat = hidden.flatten(0, -2)  # (B T, C)
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            if not torch.is_grad_enabled():  # which the function could not tell: nothing asks for gradients then
                flat, weight = flat.detach(), weight.detach()
            total, bad = _ChunkedCrossEntropy.apply(flat, weight, targets.flatten(), vocab_used)
            return LossOutput(total, count, bad)
        logits = head_logits(flat, weight, vocab_used)
        losses = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return LossOutput(losses.sum(), count, (~losses.isfinite()).sum())

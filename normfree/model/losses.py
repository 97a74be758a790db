"""Training losses: from the final hidden states and the head's matrix, so that logits need not exist."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.config import IGNORED
from normfree.kernels import autocast_dtype
from normfree.kernels.loss import linear_cross_entropy


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


class CrossEntropy:
    """Negative log-likelihood of the targets.

    On the CPU in fp32, and on the fast path, the logits are never held at once: half the memory and less time.
    """

    fast = False

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_used: int) -> LossOutput:
        """hidden (B, T, C), weight (V, C), targets (B, T) with `IGNORED` where there is none."""
        count = (targets != IGNORED).sum()
        flat = hidden.flatten(0, -2)  # (B T, C)
        half = autocast_dtype(hidden)
        if self.fast or (hidden.device.type == "cpu" and hidden.dtype == torch.float32 and half is None):
            flat = flat if half is None else flat.to(half)
            total, bad = linear_cross_entropy(flat, weight, targets.flatten(), vocab_used)
            return LossOutput(total, count, bad)
        logits = head_logits(flat, weight, vocab_used)
        losses = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return LossOutput(losses.sum(), count, (~losses.isfinite()).sum())

"""Training losses: from the final hidden states and the head's matrix, so that logits need not exist."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that takes no part in the loss


class LossOutput(NamedTuple):
    """`sum` of the losses of `count` targets, in nats, fp32; both 0-d."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is not needed


def head_logits(hidden: Tensor, weight: Tensor, vocab_used: int) -> Tensor:
    """(..., C) and (V, C) -> (..., V). Rows that pad the vocabulary get -inf: they take no probability."""
    logits = F.linear(hidden, weight)
    if vocab_used < weight.size(0):
        logits[..., vocab_used:] = float("-inf")
    return logits


class CrossEntropy:
    """Negative log-likelihood of the targets."""

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_used: int) -> LossOutput:
        """hidden (B, T, C), weight (V, C), targets (B, T) with `IGNORED` where there is none."""
        logits = head_logits(hidden, weight, vocab_used)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return LossOutput(loss, (targets != IGNORED).sum())

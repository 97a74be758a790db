"""The CUDA kernel between the head's two matrix products; imported for CUDA tensors only, by `loss` beside it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_gradient(
    LOGITS, TARGETS, LOSSES, V, used, stride, IGNORED: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """Row r of the logits becomes softmax - one-hot; its loss is written. The second reading comes from the cache.

    A lane takes `EACH` neighbours at a time, so that its running sum is scaled once for them: exponentials are what
    this costs.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    target = tl.load(TARGETS + row)
    kept = target != IGNORED
    place = tl.arange(0, BLOCK)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    m = tl.full([BLOCK], -1e30, tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK * EACH):
        column = start + place
        x = tl.load(logits + column, mask=column < used, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(m, tl.max(x, 1))  # passes over NaN, which the exponentials keep
        z = z * tl.exp2(m - new) + tl.sum(tl.exp2(x - new[:, None]), 1)
        m = new
    top = tl.max(m, 0)
    lse2 = top + tl.log2(tl.sum(z * tl.exp2(m - top), 0))
    right = tl.load(logits + tl.where(kept, target, 0)).to(tl.float32) * 1.4426950408889634
    tl.store(LOSSES + row, tl.where(kept, (lse2 - right) * 0.6931471805599453, 0.0))
    tl.debug_barrier()  # `right` is read before another thread overwrites it
    for start in range(0, V, BLOCK * EACH):
        column = start + place
        x = tl.load(logits + column, mask=column < used, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        p = tl.exp2(x - lse2) - tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, tl.where(kept, p, 0.0).to(LOGITS.dtype.element_ty), mask=column < V)


def softmax_gradient_(logits: Tensor, targets: Tensor, used: int, ignored: int) -> Tensor:
    """logits (R, V) become their gradient in place; returns the losses, (R,) float32."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    assert logits.stride(1) == 1
    with torch.cuda.device(logits.device):
        _softmax_gradient[(len(logits),)](
            *(logits, targets, losses, logits.size(1), used, logits.stride(0)),
            IGNORED=ignored,
            BLOCK=512,
            EACH=16,
            num_warps=16,
        )
    return losses

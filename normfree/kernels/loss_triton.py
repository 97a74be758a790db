"""The CUDA kernel between the head's two matrix products; imported for CUDA tensors only, by `loss` beside it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _take_in(x, m, z):
    """Add a tile of logits (BLOCK, EACH) to the lanes' maximum m and sum z of 2^((x - m) log2 e)."""
    x = x.to(tl.float32)
    new = tl.maximum(m, tl.max(x, 1))  # passes over NaN, which the exponentials keep
    z *= tl.exp2((m - new) * 1.4426950408889634)
    return new, z + tl.sum(tl.exp2((x - new[:, None]) * 1.4426950408889634), 1)


@triton.jit
def _softmax_gradient(
    LOGITS, TARGETS, LOSSES, V, used, stride, IGNORED: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """Row r of the logits becomes softmax - one-hot; its loss is written. The second reading comes from the cache.

    A lane takes `EACH` neighbours at a time, so that its running sum is scaled once for them: instructions are what
    this costs, and so whole tiles are neither masked nor searched for the target.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    target = tl.load(TARGETS + row)
    kept = target != IGNORED
    place = tl.arange(0, BLOCK)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    whole = used // (BLOCK * EACH) * (BLOCK * EACH)
    m = tl.full([BLOCK], -1e30, tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK * EACH):
        m, z = _take_in(tl.load(logits + start + place), m, z)
    m, z = _take_in(tl.load(logits + whole + place, mask=whole + place < used, other=float("-inf")), m, z)
    top = tl.max(m, 0)
    log2_z = tl.log2(tl.sum(z * tl.exp2((m - top) * 1.4426950408889634), 0))
    log2_p = (tl.load(logits + tl.where(kept, target, 0)).to(tl.float32) - top) * 1.4426950408889634 - log2_z
    tl.store(LOSSES + row, tl.where(kept, -0.6931471805599453 * log2_p, 0.0))
    log2_z = tl.where(kept, log2_z, float("inf"))  # an ignored row has no gradient
    tl.debug_barrier()  # the target's logit is read before another thread overwrites it
    for start in range(0, whole, BLOCK * EACH):
        x = tl.load(logits + start + place).to(tl.float32)
        p = tl.exp2((x - top) * 1.4426950408889634 - log2_z)
        tl.store(logits + start + place, p.to(LOGITS.dtype.element_ty))
    for start in range(whole, V, BLOCK * EACH):
        column = start + place
        x = tl.load(logits + column, mask=column < used, other=float("-inf")).to(tl.float32)
        p = tl.exp2((x - top) * 1.4426950408889634 - log2_z)
        tl.store(logits + column, p.to(LOGITS.dtype.element_ty), mask=column < V)
    tl.debug_barrier()  # the target's probability is written before it is corrected
    tl.store(logits + target, (tl.exp2(log2_p) - 1.0).to(LOGITS.dtype.element_ty), mask=kept)


def softmax_gradient_(logits: Tensor, targets: Tensor, used: int, ignored: int) -> Tensor:
    """logits (R, V) become their gradient in place; returns the losses, (R,) float32."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    assert logits.stride(1) == 1
    with torch.cuda.device(logits.device):
        _softmax_gradient[(len(logits),)](
            *(logits, targets, losses, logits.size(1), used, logits.stride(0)),
            IGNORED=ignored,
            BLOCK=1024,
            EACH=8,
            num_warps=32,
        )
    return losses

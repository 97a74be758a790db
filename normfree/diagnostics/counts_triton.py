"""The CUDA kernels that count NaN and Inf elements; a tensor whose gate is finite is not read.

This module imports Triton, so it is imported for CUDA tensors only: by `census` beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 128  # programs that count one tensor


@triton.jit
def _count_many(POINTERS, SIZES, GATES, OUT, BLOCK: tl.constexpr):
    """NaN and Inf elements of float32 tensors, by their addresses; one with a finite gate is not read."""
    n = tl.program_id(0)
    gate = tl.load(GATES + n)
    nan = tl.zeros([BLOCK], tl.int64)
    inf = tl.zeros([BLOCK], tl.int64)
    if (gate != gate) | (tl.abs(gate) == float("inf")):
        size = tl.load(SIZES + n)
        base = tl.load(POINTERS + n).to(tl.pointer_type(tl.float32))
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(base + i, mask=i < size, other=0.0)
            nan += (x != x).to(tl.int64)
            inf += (tl.abs(x) == float("inf")).to(tl.int64)
    tl.store(OUT + 2 * n, tl.sum(nan))
    tl.store(OUT + 2 * n + 1, tl.sum(inf))


@triton.jit
def _count(X, GATE, OUT, numel, H, T, D, x_b, x_h, x_t, x_d, BLOCK: tl.constexpr):
    """NaN and Inf elements of x (B, H, T, D), a share for each program; nothing is read where the gate is finite."""
    gate = tl.load(GATE)
    nan = tl.zeros([BLOCK], tl.int64)
    inf = tl.zeros([BLOCK], tl.int64)
    if (gate != gate) | (tl.abs(gate) == float("inf")):
        for start in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            i = tl.arange(0, BLOCK).to(tl.int64) + BLOCK * start
            place = i // (H * T * D) * x_b + i // (T * D) % H * x_h + i // D % T * x_t + i % D * x_d
            x = tl.load(X + place, mask=i < numel, other=0.0).to(tl.float32)
            nan += (x != x).to(tl.int64)
            inf += (tl.abs(x) == float("inf")).to(tl.int64)
    tl.store(OUT + 2 * tl.program_id(0), tl.sum(nan))
    tl.store(OUT + 2 * tl.program_id(0) + 1, tl.sum(inf))


def count_non_finite(x: Tensor, gate: Tensor) -> Tensor:
    """NaN and Inf elements of x, of up to four dimensions and any strides: (`COUNTERS`, 2) int64, to be added up."""
    out = torch.empty(COUNTERS, 2, dtype=torch.int64, device=x.device)
    view = x[(None,) * (4 - x.dim())]
    with torch.cuda.device(x.device):
        _count[(COUNTERS,)](x, gate, out, x.numel(), *view.shape[1:], *view.stride(), BLOCK=2048, num_warps=8)
    return out


def count_many(tensors: list[Tensor], gates: Tensor) -> Tensor:
    """NaN and Inf elements of each contiguous float32 tensor: (tensors, 2) int64; 0 where its gate is finite."""
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors), "elements are read as they lie"
    table = torch.tensor([[t.data_ptr() for t in tensors], [t.numel() for t in tensors]], pin_memory=True)
    table = table.to(gates.device, non_blocking=True)
    out = torch.empty(len(tensors), 2, dtype=torch.int64, device=gates.device)
    with torch.cuda.device(gates.device):
        _count_many[(len(tensors),)](table[0], table[1], gates, out, BLOCK=4096, num_warps=8)
    return out

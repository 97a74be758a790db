"""A matrix product whose epilogue takes the activation's gradient; imported for CUDA tensors only."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _gradient_product(
    A, B, SLOPE, OUT, SUMS, M, N, K, SIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OUT = (A B) * SLOPE: A (M, K), B (K, N), the others (M, N); SUMS (M / BM, N) has the column sums of OUT's tiles.

    With SIGN a slope counts as 1 where it is positive, else as 0.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)  # neighbours share rows of A and columns of B in the cache
    rows = min(tiles_m - group * GROUP, GROUP)
    m = group * GROUP + program % (GROUP * tiles_n) % rows
    n = program % (GROUP * tiles_n) // rows
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(A.load([m * BM, k]), B.load([k, n * BN]), acc)
    slope = SLOPE.load([m * BM, n * BN])
    if SIGN:
        grad = tl.where(slope > 0, acc, 0.0)
    else:
        grad = acc * slope.to(tl.float32)
    OUT.store([m * BM, n * BN], grad.to(OUT.dtype))
    column = n * BN + tl.arange(0, BN)
    tl.store(SUMS + m * N + column, tl.sum(grad, 0), mask=column < N)


# Columns, depth, warps, stages: two programs share a processor, so that one multiplies while the other writes.
TILE = (128, 32, 4, 4)


def gradient_product(a: Tensor, b: Tensor, slope: Tensor, sign: bool, BM: int) -> tuple[Tensor, Tensor]:
    """The gradient before the activation (M, N), and sums of its columns over BM rows each (M / BM, N) float32."""
    M, K = a.shape
    N = b.size(1)
    BN, BK, warps, stages = TILE
    out = torch.empty_like(slope)
    sums = torch.empty(triton.cdiv(M, BM), N, dtype=torch.float32, device=a.device)
    with torch.cuda.device(a.device):
        _gradient_product[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            TensorDescriptor.from_tensor(a, [BM, BK]),
            TensorDescriptor.from_tensor(b, [BK, BN]),
            TensorDescriptor.from_tensor(slope, [BM, BN]),
            TensorDescriptor.from_tensor(out, [BM, BN]),
            *(sums, M, N, K, sign, BM, BN, BK, 8),
            num_warps=warps,
            num_stages=stages,
        )
    return out, sums

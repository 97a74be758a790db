"""A matrix product whose epilogue takes the activation's gradient; imported for CUDA tensors only."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _gelu_tanh(x):
    """The activation and its derivative. (1 + tanh u) / 2 is the logistic function of 2u."""
    share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, share + x * share * (1.0 - share) * slope


@triton.jit
def _gradient_product(
    A, B, SAVED, OUT, HIDDEN, SUMS, M, N, K, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OUT = (A B) act'(x): A (M, K), B (K, N), the others (M, N); SUMS (M / BM, N) has the column sums of OUT's tiles.

    For relu SAVED is its output, else x; then HIDDEN gets act(x), which the next product needs.
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
    saved = SAVED.load([m * BM, n * BN])
    if ACT == "relu":
        grad = tl.where(saved > 0, acc, 0.0)
    else:
        tl.static_assert(ACT == "gelu_tanh")
        value, slope = _gelu_tanh(saved.to(tl.float32))
        HIDDEN.store([m * BM, n * BN], value.to(HIDDEN.dtype))
        grad = acc * slope
    OUT.store([m * BM, n * BN], grad.to(OUT.dtype))
    column = n * BN + tl.arange(0, BN)
    tl.store(SUMS + m * N + column, tl.sum(grad, 0), mask=column < N)


# Rows, columns, depth, warps, stages: two programs share a processor, so that one multiplies while the other writes.
TILE = (128, 128, 32, 4, 4)


def gradient_product(a: Tensor, b: Tensor, saved: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before the activation (M, N), its column sums (N,) float32, and act(x), empty for relu."""
    M, K = a.shape
    N = b.size(1)
    BM, BN, BK, warps, stages = TILE
    out = torch.empty_like(saved)
    hidden = saved.new_empty(0) if act == "relu" else torch.empty_like(saved)
    sums = torch.empty(triton.cdiv(M, BM), N, dtype=torch.float32, device=a.device)
    with torch.cuda.device(a.device):
        outer = [TensorDescriptor.from_tensor(t, [BM, BN]) for t in (saved, out, out if act == "relu" else hidden)]
        _gradient_product[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            TensorDescriptor.from_tensor(a, [BM, BK]),
            TensorDescriptor.from_tensor(b, [BK, BN]),
            *(*outer, sums, M, N, K, act, BM, BN, BK, 8),
            num_warps=warps,
            num_stages=stages,
        )
    return out, sums.sum(0), hidden

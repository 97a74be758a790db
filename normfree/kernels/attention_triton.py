"""The CUDA kernels of attention over short sequences; imported for CUDA tensors only, by `attention` beside it.

One program holds all queries and keys of one head of one sequence, as two blocks of positions: the scores of a block of
rows live in registers, the backward pass computes them again from q and k and needs nothing else, and no sum is shared
between programs. Of the four blocks of scores the one after the diagonal is never computed.

A row's largest product is subtracted before the products are scaled: the difference is exactly 0 there, however
large it is. (s c - m would be one rounding for s c and another for m: at 1e10, thousands apart.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _load(base, first, T, stride, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows first .. first + BLOCK - 1 of one head, (BLOCK, D), 0 from T on."""
    t = first + tl.arange(0, BLOCK)
    return tl.load(base + t[:, None] * stride + tl.arange(0, D)[None, :], mask=t[:, None] < T, other=0.0)


@triton.jit
def _store(base, x, first, T, stride, BLOCK: tl.constexpr, D: tl.constexpr):
    t = first + tl.arange(0, BLOCK)
    place = base + t[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(place, x.to(base.dtype.element_ty), mask=t[:, None] < T)


@triton.jit
def _diagonal(q, k, BLOCK: tl.constexpr):
    """Products of a block of rows with the keys at their own positions."""
    t = tl.arange(0, BLOCK)
    return tl.where(t[None, :] <= t[:, None], tl.dot(q, tl.trans(k)), float("-inf"))


@triton.jit
def _softmax(s, c):
    p = tl.exp2((s - tl.max(s, 1)[:, None]) * c)
    return p * (1.0 / tl.sum(p, 1))[:, None]  # one division a row: each takes four instructions


@triton.jit
def _softmax_of_two(s_0, s_1, c):
    m = tl.maximum(tl.max(s_0, 1), tl.max(s_1, 1))
    p_0 = tl.exp2((s_0 - m[:, None]) * c)
    p_1 = tl.exp2((s_1 - m[:, None]) * c)
    total = 1.0 / (tl.sum(p_0, 1) + tl.sum(p_1, 1))
    return p_0 * total[:, None], p_1 * total[:, None]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _terms(s, m, c):
    """2^t, the sum of t 2^t over the row, with t = (s - m) c no lower than -1e4: -inf weighs 0 times a number."""
    t = _larger((s - m[:, None]) * c, -1e4)
    p = tl.exp2(t)
    return p, tl.sum(p * t, 1)


@triton.jit
def _row_peak(x):
    return tl.reduce(tl.abs(x.to(tl.float32)), 1, _larger)


@triton.jit
def _write_rows(ROWS, n, place, inside, m, z, w, sink, q, k):
    """A block's rows of `normfree.diagnostics.census`: entropy, lse, largest score, sink mass, peaks of q and k.

    m is the largest score in bits, z and w are the sums of 2^t and t 2^t. Two at a time: each store waits twice for all
    of the block's threads.
    """
    log2_z = tl.log2(z)
    top = tl.where((z != z) & (m < float("inf")), float("nan"), m)  # of a NaN the maximum says nothing
    two = ROWS + place[:, None] + n * tl.arange(0, 2)[None, :]
    inside = inside[:, None]
    tl.store(two, tl.join(0.6931471805599453 * (log2_z - w / z), 0.6931471805599453 * (m + log2_z)), mask=inside)
    tl.store(two + 2 * n, tl.join(0.6931471805599453 * top, sink / z), mask=inside)
    tl.store(two + 4 * n, tl.join(_row_peak(q), _row_peak(k)), mask=inside)


@triton.jit
def _short_forward(QKV, OUT, ROWS, n, T, C, H, c, BLOCK: tl.constexpr, D: tl.constexpr, LOOK: tl.constexpr):
    b = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H * D
    base = QKV + b * T * 3 * C + head
    out = OUT + b * T * C + head
    row = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * T + row
    first_key = row[None, :] == 0
    k_0 = _load(base + C, 0, T, 3 * C, BLOCK, D)
    v_0 = _load(base + 2 * C, 0, T, 3 * C, BLOCK, D)
    q_0 = _load(base, 0, T, 3 * C, BLOCK, D)
    k_1 = _load(base + C, BLOCK, T, 3 * C, BLOCK, D)  # each once, before anything is computed
    v_1 = _load(base + 2 * C, BLOCK, T, 3 * C, BLOCK, D)
    q_1 = _load(base, BLOCK, T, 3 * C, BLOCK, D)
    s = _diagonal(q_0, k_0, BLOCK)
    m = tl.max(s, 1)
    if LOOK:
        p_0, w = _terms(s, m, c)
        z = tl.sum(p_0, 1)
        sink = tl.sum(tl.where(first_key, p_0, 0.0), 1)
        _write_rows(ROWS, n, place, row < T, m * c, z, w, sink, q_0, k_0)
    else:
        p_0 = tl.exp2((s - m[:, None]) * c)
        z = tl.sum(p_0, 1)
    _store(out, tl.dot(p_0.to(v_0.dtype), v_0) * (1.0 / z)[:, None], 0, T, C, BLOCK, D)

    s_0 = tl.dot(q_1, tl.trans(k_0))
    s_1 = _diagonal(q_1, k_1, BLOCK)
    m = tl.maximum(tl.max(s_0, 1), tl.max(s_1, 1))
    if LOOK:
        p_0, w_0 = _terms(s_0, m, c)
        p_1, w_1 = _terms(s_1, m, c)
        z = tl.sum(p_0, 1) + tl.sum(p_1, 1)
        sink = tl.sum(tl.where(first_key, p_0, 0.0), 1)
        _write_rows(ROWS, n, place + BLOCK, row + BLOCK < T, m * c, z, w_0 + w_1, sink, q_1, k_1)
    else:
        p_0 = tl.exp2((s_0 - m[:, None]) * c)
        p_1 = tl.exp2((s_1 - m[:, None]) * c)
        z = tl.sum(p_0, 1) + tl.sum(p_1, 1)
    y = tl.dot(p_0.to(v_0.dtype), v_0)
    y = tl.dot(p_1.to(v_1.dtype), v_1, y)
    _store(out, y * (1.0 / z)[:, None], BLOCK, T, C, BLOCK, D)


@triton.jit
def _short_backward(GRAD, QKV, OUT, T, C, H, c, scale, BLOCK: tl.constexpr, D: tl.constexpr):
    """dV = P^T dY, dP = dY V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q, block by block.

    The row's sum is taken as it stands, not as that of y dy: y is rounded, and where attention is one-hot all of dS
    would be that rounding.
    """
    b = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H * D
    base = QKV + b * T * 3 * C + head
    out = OUT + b * T * 3 * C + head
    grad = GRAD + b * T * C + head
    k_0 = _load(base + C, 0, T, 3 * C, BLOCK, D)
    v_0 = _load(base + 2 * C, 0, T, 3 * C, BLOCK, D)
    q_0 = _load(base, 0, T, 3 * C, BLOCK, D)
    dy_0 = _load(grad, 0, T, C, BLOCK, D)
    k_1 = _load(base + C, BLOCK, T, 3 * C, BLOCK, D)  # each once, before anything is computed
    v_1 = _load(base + 2 * C, BLOCK, T, 3 * C, BLOCK, D)
    q_1 = _load(base, BLOCK, T, 3 * C, BLOCK, D)
    dy_1 = _load(grad, BLOCK, T, C, BLOCK, D)
    p = _softmax(_diagonal(q_0, k_0, BLOCK), c)
    dv_0 = tl.dot(tl.trans(p.to(dy_0.dtype)), dy_0)
    dp = tl.dot(dy_0, tl.trans(v_0))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q_0.dtype)
    dk_0 = tl.dot(tl.trans(ds), q_0)
    _store(out, tl.dot(ds, k_0), 0, T, 3 * C, BLOCK, D)

    p, p_1 = _softmax_of_two(tl.dot(q_1, tl.trans(k_0)), _diagonal(q_1, k_1, BLOCK), c)
    _store(out + 2 * C, tl.dot(tl.trans(p.to(dy_1.dtype)), dy_1, dv_0), 0, T, 3 * C, BLOCK, D)
    _store(out + 2 * C, tl.dot(tl.trans(p_1.to(dy_1.dtype)), dy_1), BLOCK, T, 3 * C, BLOCK, D)
    dp, dp_1 = tl.dot(dy_1, tl.trans(v_0)), tl.dot(dy_1, tl.trans(v_1))
    delta = tl.sum(p * dp, 1) + tl.sum(p_1 * dp_1, 1)
    ds = (p_1 * (dp_1 - delta[:, None]) * scale).to(q_1.dtype)
    _store(out + C, tl.dot(tl.trans(ds), q_1), BLOCK, T, 3 * C, BLOCK, D)
    dq = tl.dot(ds, k_1)
    ds = (p * (dp - delta[:, None]) * scale).to(q_1.dtype)
    _store(out + C, tl.dot(tl.trans(ds), q_1, dk_0), 0, T, 3 * C, BLOCK, D)
    _store(out, tl.dot(ds, k_0, dq), BLOCK, T, 3 * C, BLOCK, D)


def _sizes(qkv: Tensor, heads: int) -> tuple[int, int, int, dict[str, int]]:
    B, T, width = qkv.shape
    C = width // 3
    block = max(16, triton.next_power_of_2(triton.cdiv(T, 2)))
    return B, T, C, {"BLOCK": block, "D": C // heads, "num_warps": 4}


def forward(qkv: Tensor, heads: int, scale: float, look: bool) -> tuple[Tensor, Tensor]:
    """The output (B, T, C), and where `look` the rows (6, B, H, T), else an empty tensor."""
    B, T, C, sizes = _sizes(qkv, heads)
    out = torch.empty(B, T, C, dtype=qkv.dtype, device=qkv.device)
    rows = torch.empty((6, B, heads, T) if look else (0,), dtype=torch.float32, device=qkv.device)
    room = {"maxnreg": 168} if look and C // heads <= 64 else {}  # for three programs on a processor, not two
    with torch.cuda.device(qkv.device):
        args = qkv, out, rows, B * heads * T, T, C, heads, scale * LOG2_E
        _short_forward[(B * heads,)](*args, **sizes, LOOK=look, **room)
    return out, rows


def backward(grad: Tensor, qkv: Tensor, heads: int, scale: float) -> Tensor:
    B, T, C, sizes = _sizes(qkv, heads)
    out = torch.empty_like(qkv)
    with torch.cuda.device(qkv.device):
        _short_backward[(B * heads,)](grad, qkv, out, T, C, heads, scale * LOG2_E, scale, **sizes)
    return out

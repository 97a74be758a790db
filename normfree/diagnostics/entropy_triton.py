"""The CUDA kernels of exact attention entropy: one pass over Q K^T, and nothing of size T x T.

With c = scale * log2(e), t = c (q.k - m) and m the row's running maximum of q.k, each tile of keys adds
z = sum 2^t and w = sum 2^t t; when c m rises by d, z <- 2^-d z and w <- 2^-d (w - d z). Then H = ln 2 (log2 z - w / z).
The shift by m keeps the digits that lse - sum p s loses at large scores; as it comes before the scale, t is exactly 0
at the maximum. Products are IEEE for float32 (never TF32), and half-precision inputs are multiplied exactly and summed
in float32.

This module imports Triton, so it is imported for CUDA tensors only: by `entropy` and `census` beside it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Query rows and keys of one tile, and how many warps and pipeline stages work on it."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _scores(q, k, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(q, tl.trans(k), input_precision="ieee")
    return tl.dot(q, tl.trans(k))


@triton.jit
def _load(base, index, end, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index` of a (length, D) matrix, (rows, BLOCK_D); 0 from `end` and from D on."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index[:, None].to(tl.int64) * stride_t + d[None, :] * stride_d
    return tl.load(pointers, mask=(index[:, None] < end) & (d[None, :] < D), other=0.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _take_in(s, m, z, w, c):
    """Add a tile of products s, (rows, keys), to the running maximum m, sum z and weighted sum w of its rows."""
    new = _larger(m, tl.reduce(s, 1, _larger))
    # The floor makes a score of -inf weigh 0 times a finite number; NaN passes through it.
    t = _larger((s - new[:, None]) * c, -1e4)
    p = tl.exp2(t)
    rise = (new - m) * c
    decay = tl.exp2(-rise)
    return new, z * decay + tl.sum(p, 1), (w - rise * z) * decay + tl.sum(p * t, 1)


@triton.jit
def _entropy_forward(
    Q, K, ENTROPY, LSE, MAX, SINK, Q_PEAK, K_PEAK,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    H, T, S, q_offset, c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IEEE: tl.constexpr,
    WITH_PEAKS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest rows first
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of all B * H
    q_base = Q + head // H * q_b + head % H * q_h
    k_base = K + head // H * k_b + head % H * k_h

    row = block * ROWS + tl.arange(0, ROWS)
    q = _load(q_base, row, T, q_t, q_d, D, BLOCK_D)  # (ROWS, BLOCK_D)
    m = tl.full([ROWS], -1e30, tl.float32)  # finite, so that the first rise is
    z = tl.zeros([ROWS], tl.float32)
    w = tl.zeros([ROWS], tl.float32)
    first = q_offset + block * ROWS  # position of the block's first row: it sees keys 0 .. first
    open_end = (first + 1) // KEYS * KEYS  # tiles below are seen by every row
    end = tl.minimum(q_offset + tl.minimum((block + 1) * ROWS, T), S)
    for start in range(0, open_end, KEYS):
        k = _load(k_base, start + tl.arange(0, KEYS), S, k_t, k_d, D, BLOCK_D)
        m, z, w = _take_in(_scores(q, k, IEEE), m, z, w, c)
    for start in range(open_end, end, KEYS):
        column = start + tl.arange(0, KEYS)
        k = _load(k_base, column, S, k_t, k_d, D, BLOCK_D)
        s = _scores(q, k, IEEE)
        s = tl.where(column[None, :] <= (q_offset + row)[:, None], s, float("-inf"))
        m, z, w = _take_in(s, m, z, w, c)

    key_0 = _load(k_base, tl.zeros([1], tl.int32), S, k_t, k_d, D, BLOCK_D)  # (1, BLOCK_D)
    log2_l = tl.log2(z)
    log2_sink = (tl.sum(q.to(tl.float32) * key_0.to(tl.float32), 1) - m) * c - log2_l
    sink = tl.exp2(tl.minimum(log2_sink, 0.0, propagate_nan=tl.PropagateNan.ALL))  # this product rounds differently
    out = head * T + row
    inside = row < T
    tl.store(ENTROPY + out, 0.6931471805599453 * (log2_l - w / z), mask=inside)
    tl.store(LSE + out, 0.6931471805599453 * (m * c + log2_l), mask=inside)
    tl.store(MAX + out, 0.6931471805599453 * c * m, mask=inside)
    tl.store(SINK + out, sink, mask=inside)
    if WITH_PEAKS:  # of the query and the key at this position
        tl.store(Q_PEAK + out, tl.reduce(tl.abs(q.to(tl.float32)), 1, _larger), mask=inside)
        k = _load(k_base, row, S, k_t, k_d, D, BLOCK_D)
        tl.store(K_PEAK + out, tl.reduce(tl.abs(k.to(tl.float32)), 1, _larger), mask=inside)


@triton.jit
def _summarize_rows(ROWS, OUT, n, T, CHUNK: tl.constexpr):
    """The six rows of one head in one sequence, to four sums and three maxima; rows are (6, B H, T), n = B H T."""
    base = ROWS + tl.program_id(0).to(tl.int64) * T
    entropy = tl.zeros([CHUNK], tl.float32)
    sink = tl.zeros([CHUNK], tl.float32)
    others = tl.zeros([CHUNK], tl.float32)
    nan = tl.zeros([CHUNK], tl.float32)
    score = tl.full([CHUNK], -1e38, tl.float32)
    q_peak = tl.zeros([CHUNK], tl.float32)
    k_peak = tl.zeros([CHUNK], tl.float32)
    for start in range(0, T, CHUNK):
        row = start + tl.arange(0, CHUNK)
        inside = row < T
        h = tl.load(base + row, mask=inside, other=0.0)
        lse = tl.load(base + n + row, mask=inside, other=0.0)
        top = tl.load(base + 2 * n + row, mask=inside, other=-1e38)
        entropy += h
        nan += (h != h).to(tl.float32)
        score = _larger(score, top)
        others += tl.where(inside & (row > 0), 1.0 - tl.exp(top - lse), 0.0)
        sink += tl.load(base + 3 * n + row, mask=inside, other=0.0)
        q_peak = _larger(q_peak, tl.load(base + 4 * n + row, mask=inside, other=0.0))
        k_peak = _larger(k_peak, tl.load(base + 5 * n + row, mask=inside, other=0.0))
    out = OUT + tl.program_id(0) * 8
    tl.store(out, tl.sum(entropy))
    tl.store(out + 1, tl.sum(sink))
    tl.store(out + 2, tl.sum(others))
    tl.store(out + 3, tl.sum(nan))
    tl.store(out + 4, tl.reduce(score, 0, _larger))
    tl.store(out + 5, tl.reduce(q_peak, 0, _larger))
    tl.store(out + 6, tl.reduce(k_peak, 0, _larger))
    tl.store(out + 7, 0.0)


@triton.jit
def _summarize_batch(PARTS, OUT, B, H, rows, later_rows, CHUNK: tl.constexpr):
    """One head's parts over the batch: means and maxima, as `census.Summary`. Parts are (B, H, 8)."""
    column = tl.arange(0, 8)
    sums = tl.zeros([8], tl.float32)
    largest = tl.full([8], -1e38, tl.float32)
    for start in range(0, B, CHUNK):
        b = start + tl.arange(0, CHUNK)
        inside = (b < B)[:, None] & (column[None, :] < 8)
        parts = tl.load(PARTS + (b * H + tl.program_id(0))[:, None] * 8 + column[None, :], mask=inside, other=0.0)
        sums += tl.sum(parts, 0)
        largest = _larger(largest, tl.reduce(tl.where(inside, parts, -1e38), 0, _larger))
    over = tl.where(column < 2, rows, tl.where(column == 2, later_rows, 1.0))
    tl.store(OUT + tl.program_id(0) * 8 + column, tl.where(column < 4, sums / over, largest))


@triton.jit
def _grad_scores(s, visible, c, lse2, entropy, g_entropy, g_lse):
    """p (g_lse - g_entropy (ln p + H)), the gradient of the scores, (rows, keys); 0 where p is."""
    log2_p = _larger(s * c - lse2[:, None], -1e4)
    log2_p = tl.minimum(log2_p, 0.0, propagate_nan=tl.PropagateNan.ALL)  # two large numbers may round to more
    log2_p = tl.where(visible, log2_p, -1e4)
    g = g_lse[:, None] - g_entropy[:, None] * (log2_p * 0.6931471805599453 + entropy[:, None])
    return tl.exp2(log2_p) * g


@triton.jit
def _load_rows(ENTROPY, LSE, G_ENTROPY, G_LSE, base, row, T):
    """Of rows `row` of one head: lse in bits, entropy and the gradients of both; all 0 from T on."""
    inside = row < T
    lse2 = tl.load(LSE + base + row, mask=inside, other=0.0) * 1.4426950408889634
    entropy = tl.load(ENTROPY + base + row, mask=inside, other=0.0)
    g_entropy = tl.load(G_ENTROPY + base + row, mask=inside, other=0.0)
    g_lse = tl.load(G_LSE + base + row, mask=inside, other=0.0)
    return lse2, entropy, g_entropy, g_lse


@triton.jit
def _dot(a, b, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _backward_q(
    Q, K, ENTROPY, LSE, G_ENTROPY, G_LSE, DQ,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    H, T, S, q_offset, c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    k_base = K + head // H * k_b + head % H * k_h
    row = block * ROWS + tl.arange(0, ROWS)
    q = _load(Q + head // H * q_b + head % H * q_h, row, T, q_t, q_d, D, BLOCK_D)
    lse2, entropy, g_entropy, g_lse = _load_rows(ENTROPY, LSE, G_ENTROPY, G_LSE, head * T, row, T)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, tl.minimum(q_offset + tl.minimum((block + 1) * ROWS, T), S), KEYS):
        column = start + tl.arange(0, KEYS)
        k = _load(k_base, column, S, k_t, k_d, D, BLOCK_D)
        visible = (column[None, :] <= (q_offset + row)[:, None]) & (row[:, None] < T)
        ds = _grad_scores(_scores(q, k, IEEE), visible, c, lse2, entropy, g_entropy, g_lse)
        dq += _dot(ds.to(k.dtype), k, IEEE)
    d = tl.arange(0, BLOCK_D)
    out = DQ + (head * T + row)[:, None] * D + d[None, :]
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=(row[:, None] < T) & (d[None, :] < D))


@triton.jit
def _backward_k(
    Q, K, ENTROPY, LSE, G_ENTROPY, G_LSE, DK,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    H, T, S, q_offset, c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, KEYS)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    q_base = Q + head // H * q_b + head % H * q_h
    column = block * KEYS + tl.arange(0, KEYS)
    k = _load(K + head // H * k_b + head % H * k_h, column, S, k_t, k_d, D, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    first = tl.maximum(block * KEYS - q_offset, 0) // ROWS * ROWS  # rows before it see none of these keys
    for start in range(first, T, ROWS):
        row = start + tl.arange(0, ROWS)
        q = _load(q_base, row, T, q_t, q_d, D, BLOCK_D)
        lse2, entropy, g_entropy, g_lse = _load_rows(ENTROPY, LSE, G_ENTROPY, G_LSE, head * T, row, T)
        visible = (column[None, :] <= (q_offset + row)[:, None]) & (row[:, None] < T)
        ds = _grad_scores(_scores(q, k, IEEE), visible, c, lse2, entropy, g_entropy, g_lse)
        dk += _dot(tl.trans(ds.to(q.dtype)), q, IEEE)
    d = tl.arange(0, BLOCK_D)
    out = DK + (head * S + column)[:, None] * D + d[None, :]
    tl.store(out, (dk * scale).to(DK.dtype.element_ty), mask=(column[:, None] < S) & (d[None, :] < D))


def forward_tiles(T: int, D: int, dtype: torch.dtype) -> Tiles:
    """Measured on an H200: experiments/entropy_kernel.py."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if D > 64 else Tiles(64, 32, 4, 2)
    if D > 128 or T <= 256:
        return Tiles(64, 32, 4, 3)
    return Tiles(128, 128, 4, 3) if T > 2048 and D <= 64 else Tiles(64, 64, 4, 3)


def backward_tiles(D: int, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32 or D > 128:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2)


def _shared(*tensors: Tensor) -> list[int]:
    """Strides of the tensors, then H, T and S."""
    q, k = tensors[:2]
    return [*(s for t in tensors for s in t.stride()), q.size(1), q.size(2), k.size(2)]


def _compile_time(D: int, dtype: torch.dtype, tiles: Tiles) -> dict:
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "IEEE": dtype == torch.float32,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _run_forward(
    q: Tensor, k: Tensor, rows: list[Tensor], scale: float, q_offset: int, tiles: Tiles | None = None
) -> None:
    """Fill `rows`, each B H T numbers: entropy, lse, maximum, sink, and if there are six the peaks of q and k."""
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    B, H, T, D = q.shape
    tiles = tiles or forward_tiles(T, D, q.dtype)
    with torch.cuda.device(q.device):
        _entropy_forward[(B * H * triton.cdiv(T, tiles.rows),)](
            *(q, k, *(rows if len(rows) == 6 else [*rows, rows[0], rows[0]]), *_shared(q, k), q_offset),
            scale * LOG2_E,
            **_compile_time(D, q.dtype, tiles),
            WITH_PEAKS=len(rows) == 6,
        )


def forward(
    q: Tensor, k: Tensor, scale: float, q_offset: int, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k (B, H, S, D), any strides -> entropy, lse, max_score and sink, each (B, H, T) float32."""
    entropy, lse, max_score, sink = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(4))
    _run_forward(q, k, [entropy, lse, max_score, sink], scale, q_offset, tiles)
    return entropy, lse, max_score, sink


def census(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `normfree.diagnostics.census`: the summary (H, 8) of q and k (B, H, T, D), and the rows' entropies."""
    B, H, T, _ = q.shape
    assert q.shape == k.shape, "with an offset, not every key would be looked at"
    rows = torch.empty(6, B, H, T, dtype=torch.float32, device=q.device)
    _run_forward(q, k, list(rows), scale, 0)
    return summarize(rows), rows[0]


def summarize(rows: Tensor) -> Tensor:
    """What each row (6, B, H, T) tells, to the summary (H, 8) of the batch."""
    _, B, H, T = rows.shape
    parts = torch.empty(B, H, 8, dtype=torch.float32, device=rows.device)
    summary = torch.empty(H, 8, dtype=torch.float32, device=rows.device)
    with torch.cuda.device(rows.device):
        chunk = min(1024, max(32, triton.next_power_of_2(T)))
        _summarize_rows[(B * H,)](rows, parts, rows[0].numel(), T, CHUNK=chunk, num_warps=max(1, chunk // 128))
        over = (float(B * T), float(max(1, B * (T - 1))))
        _summarize_batch[(H,)](parts, summary, B, H, *over, CHUNK=256, num_warps=4)
    return summary


def backward(
    grad_entropy: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    entropy: Tensor,
    lse: Tensor,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k, contiguous, in their dtypes."""
    B, H, T, D = q.shape
    S = k.size(2)
    tiles = backward_tiles(D, q.dtype)
    rows = [t.contiguous() for t in (entropy, lse, grad_entropy, grad_lse)]
    dq = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, H, S, D, dtype=k.dtype, device=k.device)
    shared, settings = (*_shared(q, k), q_offset, scale * LOG2_E), _compile_time(D, q.dtype, tiles)
    with torch.cuda.device(q.device):
        _backward_q[(B * H * triton.cdiv(T, tiles.rows),)](q, k, *rows, dq, *shared, scale, **settings)
        _backward_k[(B * H * triton.cdiv(S, tiles.keys),)](q, k, *rows, dk, *shared, scale, **settings)
    return dq, dk

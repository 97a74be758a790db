"""The CUDA kernels of attention over long sequences; imported for CUDA tensors only, by `attention` beside it.

Forward: a running maximum and sum over tiles of keys (FlashAttention-2: Dao, arXiv:2307.08691), with the sum that gives
the entropy (`normfree.diagnostics.entropy_triton`) carried along where diagnostics ask for it. Backward: the scores are
computed again from the rows' maxima and sums, once by blocks of keys for dK and dV and once by blocks of rows for dQ;
so no sum is shared between programs. Everything is read from and written to packed tensors.

As in FlashAttention the row's sum of p dp is taken as that of y dy, with y as it was rounded. Where a row's attention
is nearly one-hot, what is left of its gradient is of the order of that rounding; over a whole tensor it does not show.
The kernels for short sequences take the sum as it stands; here that would be one more pass over the keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from normfree.kernels.attention_triton import LOG2_E, _larger, _load, _store, _write_rows


@triton.jit
def _probability(s, m, log2_z, c):
    """From products, their row's largest, and log2 of its sum. A product summed in another order may be larger."""
    t = tl.minimum(s - m, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(t * c - log2_z)


@triton.jit
def _take_in(s, v, m, z, w, acc, c, LOOK: tl.constexpr):
    """Add a tile of products s, (ROWS, KEYS), and its values to the rows' maximum, sums and output."""
    new = tl.maximum(m, tl.max(s, 1))
    t = (s - new[:, None]) * c  # exactly 0 at the maximum, see `attention_triton`
    p = tl.exp2(t)
    rise = (new - m) * c
    decay = tl.exp2(-rise)
    if LOOK:
        w = (w - rise * z) * decay + tl.sum(p * _larger(t, -1e4), 1)  # -inf weighs 0 times a finite number
    return new, z * decay + tl.sum(p, 1), w, tl.dot(p.to(v.dtype), v, acc * decay[:, None])


@triton.jit
def _long_forward(
    QKV, OUT, SOFTMAX, STATISTICS, n, T, C, H, c,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    first = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # the longest rows first
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of all B * H
    base = QKV + head // H * T * 3 * C + head % H * D
    q = _load(base, first, T, 3 * C, ROWS, D)
    m = tl.full([ROWS], -1e30, tl.float32)  # finite, so that the first rise is
    z = tl.zeros([ROWS], tl.float32)
    w = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, first, KEYS):
        k = _load(base + C, start, T, 3 * C, KEYS, D)
        v = _load(base + 2 * C, start, T, 3 * C, KEYS, D)
        m, z, w, acc = _take_in(tl.dot(q, tl.trans(k)), v, m, z, w, acc, c, LOOK)
    row = first + tl.arange(0, ROWS)
    for start in range(first, tl.minimum(first + ROWS, T), KEYS):
        k = _load(base + C, start, T, 3 * C, KEYS, D)
        v = _load(base + 2 * C, start, T, 3 * C, KEYS, D)
        seen = (start + tl.arange(0, KEYS))[None, :] <= row[:, None]
        s = tl.where(seen, tl.dot(q, tl.trans(k)), float("-inf"))
        m, z, w, acc = _take_in(s, v, m, z, w, acc, c, LOOK)
    _store(OUT + head // H * T * C + head % H * D, acc / z[:, None], first, T, C, ROWS, D)
    tl.store(SOFTMAX + head * T + row, m, mask=row < T)
    tl.store(SOFTMAX + n + head * T + row, tl.log2(z), mask=row < T)
    if LOOK:
        key_0 = _load(base + C, 0, 1, 3 * C, 16, D)
        first_product = tl.sum(q.to(tl.float32) * tl.sum(key_0.to(tl.float32), 0)[None, :], 1)
        sink = _probability(first_product, m, 0.0, c)
        k = _load(base + C, first, T, 3 * C, ROWS, D)
        _write_rows(STATISTICS, n, head * T + row, row < T, m * c, z, w, tl.minimum(sink, z), q, k)


@triton.jit
def _add_rows(
    q_base, dy_base, softmax, delta_base, n, first, key, k, v, dk, dv, T, C, c,
    ROWS: tl.constexpr, D: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """What rows first .. first + ROWS - 1 give to the keys' and values' gradients; scores are (KEYS, ROWS) here."""
    q = _load(q_base, first, T, 3 * C, ROWS, D)
    dy = _load(dy_base, first, T, C, ROWS, D)
    row = first + tl.arange(0, ROWS)
    m = tl.load(softmax + row, mask=row < T, other=0.0)
    log2_z = tl.load(softmax + n + row, mask=row < T, other=float("inf"))  # no probability from T on
    delta = tl.load(delta_base + row, mask=row < T, other=0.0)
    p = _probability(tl.dot(k, tl.trans(q)), m[None, :], log2_z[None, :], c)
    if DIAGONAL:
        p = tl.where(key[:, None] <= row[None, :], p, 0.0)
    dv = tl.dot(p.to(dy.dtype), dy, dv)
    ds = p * (tl.dot(v, tl.trans(dy)) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv


@triton.jit
def _long_backward_keys(
    GRAD, QKV, SOFTMAX, DELTA, OUT, n, T, C, H, c, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(T, KEYS)
    first = tl.program_id(0) % blocks * KEYS  # the keys that most rows see first
    head = (tl.program_id(0) // blocks).to(tl.int64)
    base = QKV + head // H * T * 3 * C + head % H * D
    dy = GRAD + head // H * T * C + head % H * D
    k = _load(base + C, first, T, 3 * C, KEYS, D)
    v = _load(base + 2 * C, first, T, 3 * C, KEYS, D)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    key = first + tl.arange(0, KEYS)
    softmax, delta = SOFTMAX + head * T, DELTA + head * T
    for start in range(first, tl.minimum(first + KEYS, T), ROWS):
        dk, dv = _add_rows(base, dy, softmax, delta, n, start, key, k, v, dk, dv, T, C, c, ROWS, D, True)
    for start in range(first + KEYS, T, ROWS):
        dk, dv = _add_rows(base, dy, softmax, delta, n, start, key, k, v, dk, dv, T, C, c, ROWS, D, False)
    out = OUT + head // H * T * 3 * C + head % H * D
    _store(out + C, dk * scale, first, T, 3 * C, KEYS, D)
    _store(out + 2 * C, dv, first, T, 3 * C, KEYS, D)


@triton.jit
def _long_backward_rows(
    GRAD, QKV, Y, SOFTMAX, DELTA, OUT, n, T, C, H, c, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """dQ; and the sum of p dp over each row, which is that of y dy, for `_long_backward_keys`."""
    blocks = tl.cdiv(T, ROWS)
    first = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    head = (tl.program_id(0) // blocks).to(tl.int64)
    base = QKV + head // H * T * 3 * C + head % H * D
    rows = head // H * T * C + head % H * D
    q = _load(base, first, T, 3 * C, ROWS, D)
    dy = _load(GRAD + rows, first, T, C, ROWS, D)
    row = first + tl.arange(0, ROWS)
    m = tl.load(SOFTMAX + head * T + row, mask=row < T, other=0.0)[:, None]
    log2_z = tl.load(SOFTMAX + n + head * T + row, mask=row < T, other=float("inf"))[:, None]
    delta = tl.sum(_load(Y + rows, first, T, C, ROWS, D).to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(DELTA + head * T + row, delta, mask=row < T)
    delta = delta[:, None]
    dq = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, first, KEYS):
        k = _load(base + C, start, T, 3 * C, KEYS, D)
        v = _load(base + 2 * C, start, T, 3 * C, KEYS, D)
        p = _probability(tl.dot(q, tl.trans(k)), m, log2_z, c)
        dq = tl.dot((p * (tl.dot(dy, tl.trans(v)) - delta)).to(k.dtype), k, dq)
    for start in range(first, tl.minimum(first + ROWS, T), KEYS):
        k = _load(base + C, start, T, 3 * C, KEYS, D)
        v = _load(base + 2 * C, start, T, 3 * C, KEYS, D)
        p = _probability(tl.dot(q, tl.trans(k)), m, log2_z, c)
        p = tl.where((start + tl.arange(0, KEYS))[None, :] <= row[:, None], p, 0.0)
        dq = tl.dot((p * (tl.dot(dy, tl.trans(v)) - delta)).to(k.dtype), k, dq)
    _store(OUT + head // H * T * 3 * C + head % H * D, dq * scale, first, T, 3 * C, ROWS, D)


# Rows, keys, warps and stages of a program, the fastest on an H200 at T = 1024 and D = 64.
FORWARD = (64, 64, 4, 3)
FORWARD_LOOK = (128, 64, 4, 3)
BACKWARD_ROWS = (64, 64, 4, 3)
BACKWARD_KEYS = (32, 64, 4, 3)


def _tiles(chosen: tuple[int, int, int, int]) -> dict[str, int]:
    rows, keys, warps, stages = chosen
    return {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}


def forward(qkv: Tensor, heads: int, scale: float, look: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, T, C), largest products and log2 of sums (2, B, H, T), where `look` the rows (6, B, H, T)."""
    B, T, width = qkv.shape
    C = width // 3
    out = torch.empty(B, T, C, dtype=qkv.dtype, device=qkv.device)
    softmax = torch.empty(2, B, heads, T, dtype=torch.float32, device=qkv.device)
    rows = torch.empty((6, B, heads, T) if look else (0,), dtype=torch.float32, device=qkv.device)
    with torch.cuda.device(qkv.device):
        args = (qkv, out, softmax, rows, B * heads * T, T, C, heads, scale * LOG2_E)
        tiles = _tiles(FORWARD_LOOK if look else FORWARD)
        grid = (B * heads * triton.cdiv(T, tiles["ROWS"]),)
        _long_forward[grid](*args, **tiles, D=C // heads, LOOK=look)
    return out, softmax, rows


def backward(grad: Tensor, qkv: Tensor, out: Tensor, softmax: Tensor, heads: int, scale: float) -> Tensor:
    B, T, C = out.shape
    delta = torch.empty_like(softmax[0])
    found = torch.empty_like(qkv)
    D = C // heads
    with torch.cuda.device(qkv.device):
        sizes = (found, delta.numel(), T, C, heads, scale * LOG2_E, scale)
        rows = (B * heads * triton.cdiv(T, BACKWARD_ROWS[0]),)
        _long_backward_rows[rows](grad, qkv, out, softmax, delta, *sizes, **_tiles(BACKWARD_ROWS), D=D)
        keys = (B * heads * triton.cdiv(T, BACKWARD_KEYS[1]),)
        _long_backward_keys[keys](grad, qkv, softmax, delta, *sizes, **_tiles(BACKWARD_KEYS), D=D)
    return found

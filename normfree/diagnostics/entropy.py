"""Exact entropy of causal attention, from the queries and keys that the step itself used, and its gradient.

For a row of scores s, with m = max s, l = sum e^(s-m) and w = sum e^(s-m) (s-m):  H = ln l - w / l, in nats. Unlike
lse - sum p s, this form loses no digits at large scores. With p = e^(s-lse), and g_H, g_L the gradients with respect to
H and lse:  ds_j = p_j (g_L - g_H (ln p_j + H)), where p_j = 0 contributes its limit, 0.

A score of NaN or +inf makes its row NaN, as in softmax; NaN is never turned into 0. A score of -inf, or of more than
80 below the largest, counts as e^-80 = 2e-35 of the largest probability: beside 1, nothing.

A CUDA device runs the kernels of `entropy_triton` where they can be built, except in float64; everything else runs the
loop over tiles here.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfree.kernels import can_build

# Scores held at a time, unless one row has more: few calls, and 4 MiB in fp32, which the caches hold.
TILE_ELEMENTS = 1 << 20
LOWEST = -80.0  # of s - m. e^-80 is no denormal, at which exp is five times slower, and e^x x at -inf would be NaN


MAX_HEAD_DIM = 256


class AttentionRows(NamedTuple):
    """Of each row of attention, (B, H, T), float32 (float64 for float64 inputs). The last two have no gradient."""

    entropy: Tensor  # nats
    lse: Tensor  # ln sum e^s over the scores s that the row sees
    max_score: Tensor  # the largest of them
    sink: Tensor  # the probability on key 0


def _accumulator(q: Tensor, k: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32


def _triton(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take it: a head beyond `MAX_HEAD_DIM` does not fit their tiles."""
    fits = _accumulator(q, k) == torch.float32 and q.size(-1) <= MAX_HEAD_DIM
    return q.device.type == "cuda" and fits and can_build()


class _Tiles:
    """The scores of all heads, tile by tile; `q` is (N, T, D) and `k` (N, S, D), N = B H.

    At T = 128 a tile takes half a millisecond. Calls from Python take microseconds of it, and fresh memory takes more
    than the arithmetic: both are few.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, q_offset: int) -> None:
        dtype = _accumulator(q, k)
        seen = q_offset + q.size(2)
        self.q = q.flatten(0, 1).to(dtype)
        self.k = k[:, :, :seen].flatten(0, 1).to(dtype)
        self.scale = scale
        self.q_offset = q_offset
        # Few rows: few scores after the diagonal, computed for nothing. Many rows: faster products.
        rows = min(64, max(32, q.size(2) // 8))
        self.rows = max(1, min(rows, q.size(2), TILE_ELEMENTS // max(1, seen)))
        self.bias = self.q.new_full((self.rows, self.rows), float("-inf")).triu(1)
        self.work = self.q.new_empty(2 * min(self.q.size(0) * self.rows * seen, max(TILE_ELEMENTS, seen)))

    def __iter__(self) -> Iterator[tuple[slice, slice, slice]]:
        """Heads, rows, and the keys 0 .. that the last of these rows sees."""
        N, T, _ = self.q.shape
        for start in range(0, T, self.rows):
            end = min(start + self.rows, T)
            seen = self.q_offset + end
            heads = max(1, TILE_ELEMENTS // ((end - start) * seen))
            for n in range(0, N, heads):
                yield slice(n, min(n + heads, N)), slice(start, end), slice(0, seen)

    def scores(self, heads: slice, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """(n, R, S), -inf where the key comes after the query, and memory of that shape; both last until the next."""
        q, k = self.q[heads, rows], self.k[heads, keys]
        N, R, S = q.size(0), q.size(1), k.size(1)
        size = N * R * S
        scores, free = self.work[: 2 * size].view(2, N, R, S).unbind()
        scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=self.scale)  # with beta = 0 what was there is not read
        # Rows but the last do not see the last keys: -inf there, after 0, since a NaN there is not theirs. Both are a
        # third of the time of masked_fill.
        scores[:, :, S - R :].tril_().add_(self.bias[:R, :R])
        return scores, free


def _rows(q: Tensor, k: Tensor, scale: float, q_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tile by tile computation of `attention_rows`."""
    tiles = _Tiles(q, k, scale, q_offset)
    sums = tiles.q.new_empty(4, *tiles.q.shape[:2])  # (4, N, T)
    for heads, rows, keys in tiles:
        top, total, weighted, first = sums[:, heads, rows].unbind()
        scores, free = tiles.scores(heads, rows, keys)
        torch.amax(scores, -1, out=top)
        shifted = scores.sub_(top.unsqueeze(-1)).clamp_(min=LOWEST)  # NaN stays NaN
        weight = torch.exp(shifted, out=free)
        torch.sum(weight, -1, out=total)
        first.copy_(weight.select(-1, 0))
        torch.sum(weight.mul_(shifted), -1, out=weighted)
    top, total, weighted, first = sums.view(4, *q.shape[:3]).unbind()
    log_total = total.log()
    return log_total - weighted / total, top + log_total, top.clone(), first / total


def _rows_backward(
    grad_entropy: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    entropy: Tensor,
    lse: Tensor,
    scale: float,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k; the probabilities are computed again, tile by tile."""
    tiles = _Tiles(q, k, scale, offset)
    grad_entropy, grad_lse, entropy, lse = (x.flatten(0, 1)[..., None] for x in (grad_entropy, grad_lse, entropy, lse))
    dq, dk = tiles.q.new_empty(tiles.q.shape), tiles.k.new_zeros(k.flatten(0, 1).shape)
    for heads, rows, keys in tiles:
        scores, free = tiles.scores(heads, rows, keys)
        R, S = scores.shape[1:]
        log_p = scores.sub_(lse[heads, rows]).clamp_(min=LOWEST)
        p = torch.exp(log_p, out=free)
        p[:, :, S - R :].tril_()  # exactly 0 after the query, where e^LOWEST stood
        log_p.add_(entropy[heads, rows]).mul_(grad_entropy[heads, rows])
        grad = p.mul_(log_p.neg_().add_(grad_lse[heads, rows]))  # of the scores
        dq[heads, rows] = torch.bmm(grad, tiles.k[heads, keys])
        dk[heads, keys].baddbmm_(grad.transpose(1, 2), tiles.q[heads, rows])
    return dq.mul_(scale).view(q.shape).to(q.dtype), dk.mul_(scale).view(k.shape).to(k.dtype)


# The operators are opaque to torch.compile, so that the loop is not unrolled into every layer's graph. Autocast is off
# in them: it would round the products to half precision, and the entropy is exact for the inputs as they are.


@torch.library.custom_op("normfree::attention_rows", mutates_args=())
def _attention_rows(q: Tensor, k: Tensor, scale: float, q_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if _triton(q, k):
            from normfree.diagnostics import entropy_triton

            return entropy_triton.forward(q, k, scale, q_offset)
        return _rows(q, k, scale, q_offset)


@_attention_rows.register_fake
def _(q: Tensor, k: Tensor, scale: float, q_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = q.shape[:-1], _accumulator(q, k)
    return (
        q.new_empty(shape, dtype=dtype),
        q.new_empty(shape, dtype=dtype),
        q.new_empty(shape, dtype=dtype),
        q.new_empty(shape, dtype=dtype),
    )


@torch.library.custom_op("normfree::attention_rows_backward", mutates_args=())
def _attention_rows_backward(
    grad_entropy: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    entropy: Tensor,
    lse: Tensor,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if _triton(q, k):
            from normfree.diagnostics import entropy_triton

            return entropy_triton.backward(grad_entropy, grad_lse, q, k, entropy, lse, scale, q_offset)
        return _rows_backward(grad_entropy, grad_lse, q, k, entropy, lse, scale, q_offset)


@_attention_rows_backward.register_fake
def _(
    grad_entropy: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    entropy: Tensor,
    lse: Tensor,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, ctx.scale, ctx.q_offset = inputs
    entropy, lse, max_score, sink = output
    ctx.save_for_backward(q, k, entropy, lse)
    ctx.mark_non_differentiable(max_score, sink)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_entropy: Tensor | None, grad_lse: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    q, k, entropy, lse = ctx.saved_tensors
    if grad_entropy is None and grad_lse is None:
        return None, None, None, None
    grad_entropy = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    dq, dk = _attention_rows_backward(grad_entropy, grad_lse, q, k, entropy, lse, ctx.scale, ctx.q_offset)
    return dq, dk, None, None


# attention_rows_backward has no gradient of its own: differentiating twice raises.
_attention_rows.register_autograd(_gradients, setup_context=_save)


def attention_rows(q: Tensor, k: Tensor, *, scale: float | None = None, q_offset: int = 0) -> AttentionRows:
    """What one pass over the scores of causal attention tells of each row: q (B, H, T, D), k (B, H, S, D).

    Query row i stands at position `q_offset + i` and sees keys 0 .. q_offset + i, so its entropy can reach
    ln(q_offset + i + 1). Exact for the q and k given: half-precision inputs are not rounded further, under autocast
    neither. `scale` defaults to 1/sqrt(D). `entropy` and `lse` can be differentiated once with respect to q and k.
    Memory beyond the result grows with T and S, never with T x S.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3):
        raise ValueError(f"q must be (B, H, T, D) and k (B, H, S, D); got {tuple(q.shape)} and {tuple(k.shape)}")
    if q_offset < 0 or q_offset + q.size(2) > k.size(2):
        raise ValueError(f"{q.size(2)} queries from position {q_offset} need as many keys; there are {k.size(2)}")
    scale = q.size(3) ** -0.5 if scale is None else scale
    return AttentionRows(*_attention_rows(q, k, scale, q_offset))


def attention_entropy(q: Tensor, k: Tensor, *, scale: float | None = None, q_offset: int = 0) -> Tensor:
    """Entropy in nats of each row of causal attention: q (B, H, T, D), k (B, H, S, D) -> (B, H, T).

    float32 (float64 for float64 inputs), with a gradient; the arguments are those of `attention_rows`.
    """
    return attention_rows(q, k, scale=scale, q_offset=q_offset).entropy

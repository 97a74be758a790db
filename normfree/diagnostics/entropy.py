"""Exact entropy of causal attention, from the queries and keys that the step itself used.

For a row of scores s, with m = max s, l = sum e^(s-m) and w = sum e^(s-m) (s-m):  H = ln l - w / l, in nats. Unlike
lse - sum p s, this form loses no digits at large scores. A score of NaN or +inf makes its row NaN, as in softmax; NaN
is never turned into 0.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # scores held at a time: 16 MiB in fp32


def _entropy_rows(q: Tensor, k: Tensor, scale: float, position: int) -> Tensor:
    """q (N, R, D) at positions `position` .. `position + R - 1`, k (N, S, D) -> (N, R)."""
    rows, keys = q.size(1), k.size(1)
    scores = torch.matmul(q, k.transpose(1, 2)) * scale  # (N, R, S)
    column = torch.arange(keys, device=q.device)
    hidden = column > torch.arange(position, position + rows, device=q.device)[:, None]  # (R, S)
    scores = scores.masked_fill(hidden, float("-inf"))
    shifted = scores - scores.amax(-1, keepdim=True)
    weight = shifted.exp()
    total = weight.sum(-1)
    # A weight of 0 contributes 0 (the limit of e^x x); a NaN weight stays NaN.
    weighted = torch.where(weight == 0, 0.0, weight * shifted).sum(-1)
    return total.log() - weighted / total


@torch.library.custom_op("normfree::attention_entropy", mutates_args=())
def _attention_entropy(q: Tensor, k: Tensor, scale: float, q_offset: int) -> Tensor:
    """The chunked computation, opaque to torch.compile so that its loop is not unrolled into every layer's graph."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, H, T, D = q.shape
    S = k.size(2)
    # Autocast would round the products to half precision; entropy is taken of the rounded inputs, in full precision.
    with torch.autocast(q.device.type, enabled=False):
        queries = q.reshape(B * H, T, D).to(dtype)
        keys = k.reshape(B * H, S, D).to(dtype)
        out = torch.empty(B * H, T, dtype=dtype, device=q.device)
        heads = max(1, CHUNK_ELEMENTS // (T * S))
        rows = T if heads > 1 else max(1, CHUNK_ELEMENTS // S)
        for n in range(0, B * H, heads):
            for t in range(0, T, rows):
                end = min(t + rows, T)
                seen = min(S, q_offset + end)  # keys after the chunk's last query are never visible
                out[n : n + heads, t:end] = _entropy_rows(
                    queries[n : n + heads, t:end], keys[n : n + heads, :seen], scale, q_offset + t
                )
    return out.view(B, H, T)


@_attention_entropy.register_fake
def _(q: Tensor, k: Tensor, scale: float, q_offset: int) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=dtype)


def attention_entropy(q: Tensor, k: Tensor, *, scale: float | None = None, q_offset: int = 0) -> Tensor:
    """Entropy in nats of each row of causal attention: q (B, H, T, D), k (B, H, S, D) -> (B, H, T).

    Query row i stands at position `q_offset + i` and sees keys 0 .. q_offset + i, so it can reach ln(q_offset + i + 1).
    float32 (float64 for float64 inputs), exact for the q and k given: half-precision inputs are not rounded further.
    `scale` defaults to 1/sqrt(D). No gradient. Memory beyond the result is bounded by `CHUNK_ELEMENTS`, not T x S.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3):
        raise ValueError(f"q must be (B, H, T, D) and k (B, H, S, D); got {tuple(q.shape)} and {tuple(k.shape)}")
    if q_offset < 0 or q_offset + q.size(2) > k.size(2):
        raise ValueError(f"{q.size(2)} queries from position {q_offset} need as many keys; there are {k.size(2)}")
    scale = q.size(3) ** -0.5 if scale is None else scale
    return _attention_entropy(q.detach(), k.detach(), scale, q_offset)

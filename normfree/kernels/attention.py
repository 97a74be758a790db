"""Causal attention from packed queries, keys and values, with a packed gradient.

Nothing is transposed or joined. Up to T = 128 a head's scores fit a program's registers: the backward pass needs only
the input, and attention costs little more than reading and writing its tensors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_KEYS = 16  # fp32 numbers in a CPU's vector register, at most
SHORT = 128  # positions that one program can hold
HEAD_DIMS = (16, 32, 64, 128)


def expressible(qkv: Tensor, heads: int) -> bool:
    """Whether the kernels take it: qkv (B, T, 3C), half precision on CUDA, C / heads one of `HEAD_DIMS`."""
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and qkv.size(2) // (3 * heads) in HEAD_DIMS


def _unpack(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    q, k, v = qkv.view(B, T, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    return q, k, v


def _scores(q: Tensor, k: Tensor, scale: float, q_offset: int = 0) -> Tensor:
    """(B, H, T, S), -inf where a key is later than the query, which stands at its row + `q_offset`."""
    later = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(q_offset + 1)
    return (scale * q @ k.transpose(2, 3)).masked_fill(later, float("-inf"))


def attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, scale: float, q_offset: int = 0, dropout: float = 0.0
) -> Tensor:
    """Causal softmax attention with its probabilities at hand: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    For fewer than `FEW_KEYS` keys on a CPU: PyTorch's kernel takes their largest score with a comparison that leaves
    NaN out, and a row of NaN for one that sees nothing, of which it makes zeros (pytorch/pytorch#141128 was the same at
    any length). With a mask instead of `is_causal` it does not, but then a key that is NaN reaches the rows before it.
    """
    return F.dropout(_scores(q, k, scale, q_offset).softmax(-1), dropout) @ v


def _rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    s = _scores(q.float(), k.float(), scale)
    p = s.softmax(-1)
    peaks = [x.float().abs().amax(-1) for x in (q, k)]
    return torch.stack([torch.special.entr(p).sum(-1), s.logsumexp(-1), s.amax(-1), p[..., 0], *peaks])


@torch.library.custom_op("normfree::packed_attention", mutates_args=())
def _packed_attention(qkv: Tensor, heads: int, scale: float, look: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output; for the backward pass over long rows their largest products and log2 of their sums, (2, B, H, T);
    and where `look` the rows of `packed_attention`. Empty tensors where there is nothing to tell.
    """
    nothing = qkv.new_empty(0, dtype=torch.float32)
    if qkv.is_cuda and qkv.size(1) <= SHORT:
        from normfree.kernels import attention_triton

        out, rows = attention_triton.forward(qkv.contiguous(), heads, scale, look)
        return out, nothing, rows
    if qkv.is_cuda:
        from normfree.kernels import attention_long_triton

        return attention_long_triton.forward(qkv.contiguous(), heads, scale, look)
    q, k, v = _unpack(qkv, heads)
    y = attention_by_definition(q.float(), k.float(), v.float(), scale).to(v.dtype)
    rows = _rows(q, k, scale) if look else nothing.clone()
    return y.transpose(1, 2).flatten(2).contiguous(), nothing, rows


@_packed_attention.register_fake
def _(qkv: Tensor, heads: int, scale: float, look: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    softmax = (2, B, heads, T) if qkv.is_cuda and T > SHORT else (0,)
    rows = (6, B, heads, T) if look else (0,)
    f32 = torch.float32
    return qkv.new_empty(B, T, width // 3), qkv.new_empty(softmax, dtype=f32), qkv.new_empty(rows, dtype=f32)


@torch.library.custom_op("normfree::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, softmax: Tensor, heads: int, scale: float
) -> Tensor:
    if qkv.is_cuda and qkv.size(1) <= SHORT:
        from normfree.kernels import attention_triton

        return attention_triton.backward(grad.contiguous(), qkv.contiguous(), heads, scale)
    if qkv.is_cuda:
        from normfree.kernels import attention_long_triton

        return attention_long_triton.backward(grad.contiguous(), qkv.contiguous(), out, softmax, heads, scale)
    q, k, v = _unpack(qkv, heads)
    B, T, C = grad.shape
    dy = grad.view(B, T, heads, C // heads).transpose(1, 2)  # (B, H, T, D)
    p = _scores(q, k, scale).softmax(-1)
    dp = dy @ v.transpose(2, 3)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    parts = torch.stack([ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ dy])  # (3, B, H, T, D)
    return parts.permute(1, 3, 0, 2, 4).reshape(qkv.shape)


@_packed_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, softmax: Tensor, heads: int, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Tensor, int, float, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, ctx.heads, ctx.scale, _ = inputs
    ctx.save_for_backward(qkv, *output[:2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor, *unused: None) -> tuple[Tensor, None, None, None]:
    return _packed_attention_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.scale), None, None, None


_packed_attention.register_autograd(_gradient, setup_context=_save)


def packed_attention(qkv: Tensor, heads: int, scale: float, look: bool = False) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C), queries, keys and values side by side, each head after head -> (B, T, C).

    And, where diagnostics `look`, what the scores tell of each row while they are at hand, (6, B, H, T):
    entropy and log-sum-exp in nats, the largest score, the probability on key 0, the largest magnitudes of this
    position's query and key; else an empty tensor.
    """
    assert scale > 0, "a row's largest product is taken for its largest score"
    out, _, rows = _packed_attention(qkv, heads, scale, look)
    return out, rows

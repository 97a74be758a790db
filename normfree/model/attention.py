"""Causal self-attention, its key-value cache and rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.config import ModelConfig
from normfree.kernels import attention as kernel
from normfree.model.linear import Linear, linear


class KVCache:
    """Keys and values of the positions already seen, for every layer.

    Each of `keys`, `values` is (n_layer, B, H, block_size, D); the first `length` positions are filled.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) behind what is there; returns all of the layer's keys and values so far."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Rotary(nn.Module):
    """Rotary positions on the first `rotary_dim` dimensions of each head (Su et al., arXiv:2104.09864; GPT-NeoX)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.rotary_dim
        frequency = config.rotary_base ** -(torch.arange(0, dim, 2).float() / dim)  # (dim/2,)
        angle = torch.arange(config.block_size).float()[:, None] * frequency  # (block_size, dim/2)
        angle = torch.cat((angle, angle), dim=-1)  # GPT-NeoX turns dimension i with i + dim/2
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, qkv: Tensor, offset: int) -> Tensor:
        """Turn the queries and keys of qkv (B, T, 3, H, D), whose first position is `offset`; values stay."""
        dim, end = self.cos.size(1), offset + qkv.size(1)
        cos, sin = self.cos[offset:end, None, None], self.sin[offset:end, None, None]  # (T, 1, 1, rotary_dim)
        turned, kept = qkv[:, :, :2, :, :dim], qkv[:, :, :2, :, dim:]
        half_1, half_2 = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-half_2, half_1), dim=-1) * sin
        queries_and_keys = torch.cat((turned.to(qkv.dtype), kept), dim=-1)
        return torch.cat((queries_and_keys, qkv[:, :, 2:]), dim=2)


class QKVLinear(nn.Module):
    """One matrix for queries, keys and values; biases of queries and keys, and of values, can be had apart."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.fast = False
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.bias_qk = nn.Parameter(torch.empty(2 * width)) if config.bias.qk else None
        self.bias_v = nn.Parameter(torch.empty(width)) if config.bias.v else None

    @property
    def bias(self) -> Tensor | None:
        """(3C,), or None where there is none."""
        if self.bias_qk is None and self.bias_v is None:
            return None
        width = self.weight.size(1)
        qk = self.bias_qk if self.bias_qk is not None else self.weight.new_zeros(2 * width)
        v = self.bias_v if self.bias_v is not None else self.weight.new_zeros(width)
        return torch.cat((qk, v))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, 3C)"""
        return linear(x, self.weight, self.bias, self.fast)


class InnerAttention(nn.Module):
    """Causal softmax attention: the seam where diagnostics see q, k and v. It owns the scale, 1/sqrt(D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fast = False
        self.look = False  # whether diagnostics want what the fast path's own pass over the scores tells,
        self.seen: Tensor | None = None  # and that, until they take it
        self.dropout = config.dropout.attn
        self.scale = config.head_dim**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int = 0, packed: Tensor | None = None) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Query row i stands at position q_offset + i.

        `packed` (B, T, 3C): the tensor of which q, k and v are views, if they are.
        """
        queries, keys = q.size(2), k.size(2)
        assert queries + q_offset == keys, f"{queries} queries from position {q_offset}, but {keys} keys"
        square = q_offset == 0
        mask = None
        if not square and queries > 1:  # a lone last query sees every key
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(q_offset)
        dropout = self.dropout if self.training else 0.0
        if self.fast and packed is not None and not dropout and kernel.expressible(packed, q.size(1)):
            y, seen = kernel.packed_attention(packed, q.size(1), self.scale, self.look)
            self.seen = seen if self.look else None
            return y.unflatten(2, (q.size(1), -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        if keys < kernel.FEW_KEYS and q.device.type == "cpu":
            return kernel.attention_by_definition(q, k, v, self.scale, q_offset, dropout)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, dropout_p=dropout, scale=self.scale
        )


class Attention(nn.Module):
    """Causal self-attention with its projections: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.qkv = QKVLinear(config)
        self.inner_attention = InnerAttention(config)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias.attn_proj)

    def forward(self, x: Tensor, rotary: Rotary | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        offset = 0 if cache is None else cache.length
        qkv = self.qkv(x)  # (B, T, 3C)
        if rotary is not None:
            qkv = rotary(qkv.view(B, T, 3, self.n_head, -1), offset).flatten(2)  # (B, T, 3, H, D) -> (B, T, 3C)
        q, k, v = qkv.split(C, dim=-1)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, offset + T, D)
        y = self.inner_attention(q, k, v, q_offset=offset, packed=qkv if cache is None else None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

"""The decoder-only transformer of every family: what differs between GPT-2 and Pythia is data (`ModelConfig`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normfree.config import ModelConfig, resolve_model
from normfree.errors import UserError
from normfree.model.activations import build_activation
from normfree.model.attention import Attention, KVCache, Rotary
from normfree.model.feedforward import MLP
from normfree.model.losses import LossOutput, head_logits
from normfree.tables import LOSSES, NORMS


class Block(nn.Module):
    """Attention and feed-forward around the residual stream.

    Sequential (GPT-2)                     Parallel (GPT-NeoX, Pythia)

        x ─┬─ norm_1 ─ attn ─┐                 x ─┬─ norm_1 ─ attn ─┐
           └───────────────(+)                    ├─ norm_2 ─ mlp ──┤
                             │                    └───────────────(+)
           ┌─────────────────┤                                      │
           └─ norm_2 ─ mlp ─(+)                                     x
                             │
                             x

    Without norms, norm_1 and norm_2 are identities and run nothing.
    """

    def __init__(self, config: ModelConfig, layer: int, act: nn.Module) -> None:
        super().__init__()
        norm = NORMS[config.norm if config.placement == "pre" else "none"]
        self.parallel_residual = config.parallel_residual
        self.norm_1 = norm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.norm_2 = norm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config, act)
        self.drop = nn.Dropout(config.dropout.resid) if config.dropout.resid else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary | None = None, cache: KVCache | None = None) -> Tensor:
        """resid_pre (B, T, C) -> resid_post (B, T, C)"""
        attn_out = self.drop(self.attn(self.norm_1(x), rotary, cache))
        if self.parallel_residual:
            return x + attn_out + self.drop(self.mlp(self.norm_2(x)))
        x = x + attn_out  # resid_mid
        return x + self.drop(self.mlp(self.norm_2(x)))


class Transformer(nn.Module):
    """A GPT-2- or Pythia-style language model with swappable norm and activation.

    Built with uninitialised matrices: `normfree.model.init_weights(model, seed)` draws them, a checkpoint loads them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config = resolve_model(config)
        if config.vocab_size is None:
            raise UserError("model.vocab_size is null: a model without a tokenizer needs its number of token ids.")
        assert config.final_norm is not None, "resolve_model fills it in"
        self.config = config
        self.vocab_used = config.vocab_used or config.vocab_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.drop = nn.Dropout(config.dropout.embed) if config.dropout.embed else nn.Identity()
        # A parameter used by several blocks is owned here: named_parameters() then lists it once, as act.*
        self.act = build_activation(config) if config.act_scope == "global" else None
        self.blocks = nn.ModuleList(
            Block(config, layer, self.act if self.act is not None else build_activation(config))
            for layer in range(config.n_layer)
        )
        self.final_norm = NORMS[config.final_norm](config.n_embd, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss = LOSSES[config.loss]()

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, C) from hidden states to logits; the token embedding itself where they are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C), after the final norm."""
        T = idx.size(1)
        start = 0 if cache is None else cache.length
        end = start + T
        assert end <= self.config.block_size, f"{end} positions, but block_size is {self.config.block_size}"
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[start:end]
        if self.config.embed_scale != 1.0:
            x = x * self.config.embed_scale
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, self.rotary, cache)
        if cache is not None:
            cache.length = end
        return self.final_norm(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None
    ) -> Tensor | LossOutput:
        """Token ids (B, T) -> logits (B, T, V); with `targets` (B, T) the `LossOutput` instead."""
        hidden = self.hidden(idx, cache)
        if targets is None:
            return head_logits(hidden, self.head_weight, self.vocab_used)
        return self.loss(hidden, self.head_weight, targets, self.vocab_used)

    @contextmanager
    def fast_paths(self, on: bool) -> Iterator[None]:
        """Within it, forward passes under autocast take the operators of `normfree.kernels` where they have one."""
        switched = [part for part in (*self.modules(), self.loss) if hasattr(part, "fast")]
        for part in switched:
            part.fast = on
        try:
            yield
        finally:
            for part in switched:
                part.fast = False

    def new_cache(self, batch_size: int, dtype: torch.dtype = torch.float32) -> KVCache:
        return KVCache(self.config, batch_size, self.wte.weight.device, dtype)

    def slopes(self) -> Tensor | None:
        """Learned negative slopes: (n_layer,) per layer, (1,) when shared; None where there are none."""
        found = [p for name, p in self.named_parameters() if name.endswith("act.slope")]
        return torch.cat([p.detach() for p in found]) if found else None

    def parameter_counts(self) -> dict[str, int]:
        """total, non_embedding (without wte, wpe and an untied head) and trainable; shared tensors count once."""
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        outside = sum(n for name, n in sizes.items() if name.split(".")[0] in ("wte", "wpe", "lm_head"))
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(sizes.values())
        return {"total": total, "non_embedding": total - outside, "trainable": trainable}

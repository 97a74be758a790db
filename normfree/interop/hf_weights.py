"""Names and layouts of the weights of `GPT2LMHeadModel` and `GPTNeoXForCausalLM`, and ours.

| tensor             | GPT-2                               | GPT-NeoX                                          |
|--------------------|-------------------------------------|---------------------------------------------------|
| matrices of blocks | transposed (Conv1D): (in, out)      | (out, in), as ours                                |
| fused q, k, v      | all queries, all keys, all values   | q, k, v of head 0, then of head 1, ...            |
| head               | lm_head, or absent where tied       | lm_head (embed_out before transformers 5)         |
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from normfree.config import ModelConfig
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.model import Transformer

# Buffers of old files that hold no weights: causal masks and rotary frequencies.
NO_WEIGHT = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
QKV = "attn.qkv"


@dataclass(frozen=True)
class Layout:
    """Where a family keeps what: our module names to theirs."""

    base: str  # prefix of everything but the head; files saved from the headless class lack it
    blocks: str
    root_names: dict[str, str]
    block_names: dict[str, str]
    transposed: bool
    interleaved_qkv: bool

    def modules(self, config: ModelConfig) -> dict[str, str]:
        """Our module name to theirs, for every module with weights but the head."""
        names = {ours: self.base + theirs for ours, theirs in self.root_names.items()}
        for layer in range(config.n_layer):
            for ours, theirs in self.block_names.items():
                names[f"blocks.{layer}.{ours}"] = f"{self.base}{self.blocks}.{layer}.{theirs}"
        return names


GPT2 = Layout(
    base="transformer.",
    blocks="h",
    root_names={"wte": "wte", "wpe": "wpe", "final_norm": "ln_f"},
    block_names={
        "norm_1": "ln_1",
        QKV: "attn.c_attn",
        "attn.proj": "attn.c_proj",
        "norm_2": "ln_2",
        "mlp.fc": "mlp.c_fc",
        "mlp.proj": "mlp.c_proj",
    },
    transposed=True,
    interleaved_qkv=False,
)
GPT_NEOX = Layout(
    base="gpt_neox.",
    blocks="layers",
    root_names={"wte": "embed_in", "final_norm": "final_layer_norm"},
    block_names={
        "norm_1": "input_layernorm",
        QKV: "attention.query_key_value",
        "attn.proj": "attention.dense",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    },
    transposed=False,
    interleaved_qkv=True,
)


def layout(config: ModelConfig) -> Layout:
    return GPT2 if config.positions == "learned" else GPT_NEOX


def _by_kind(tensor: Tensor, n_head: int) -> Tensor:
    """Rows q, k, v of each head in turn -> all queries, all keys, all values: (3C, ...) -> (3C, ...)"""
    split = tensor.unflatten(0, (n_head, 3, -1))  # (H, 3, D, ...)
    return split.transpose(0, 1).flatten(0, 2)


def _by_head(tensor: Tensor, n_head: int) -> Tensor:
    """The inverse of `_by_kind`."""
    split = tensor.unflatten(0, (3, n_head, -1))  # (3, H, D, ...)
    return split.transpose(0, 1).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------------------------


def state_from_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors under our names and layouts. `UserError` on tensors that are missing or left over."""
    form = layout(config)
    theirs = {_full_name(name, form): t for name, t in tensors.items() if not NO_WEIGHT.search(name)}
    state: dict[str, Tensor] = {}
    missing = []
    for ours, their in form.modules(config).items():
        suffixes = ("weight",) if ours in ("wte", "wpe") else ("weight", "bias")
        for suffix in suffixes:
            tensor = theirs.pop(f"{their}.{suffix}", None)
            if tensor is None:
                missing.append(f"{their}.{suffix}")
            else:
                state |= _ours(f"{ours}.{suffix}", tensor, config, form)
    head = theirs.pop("lm_head.weight", None)
    if not config.tie_embeddings:
        if head is None:
            missing.append("lm_head.weight")
        else:
            state["lm_head.weight"] = head
    elif head is not None and "wte.weight" in state and not _same(head, state["wte.weight"]):
        raise UserError(
            "tie_word_embeddings is true, but lm_head.weight is not the token embedding; set it to false.",
            EXIT_CHECKPOINT,
        )
    if missing or theirs:
        raise UserError(_mismatch(missing, sorted(theirs)), EXIT_CHECKPOINT)
    return state


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _full_name(name: str, form: Layout) -> str:
    """The name in a file of today's class with a head."""
    if name == "embed_out.weight":
        return "lm_head.weight"
    return name if name.startswith((form.base, "lm_head.")) else form.base + name


def _ours(name: str, tensor: Tensor, config: ModelConfig, form: Layout) -> dict[str, Tensor]:
    """One of their tensors in our layout; the fused bias becomes two."""
    if form.transposed and name.startswith("blocks.") and tensor.dim() == 2:
        tensor = tensor.t()
    if QKV in name:
        expected = 3 * config.n_embd
        if tensor.size(0) != expected:
            raise UserError(f"{name} has {tensor.size(0)} rows, not 3 x {config.n_embd}.", EXIT_CHECKPOINT)
        if form.interleaved_qkv:
            tensor = _by_kind(tensor, config.n_head)
        if name.endswith(".bias"):
            qk, v = tensor.split((2 * config.n_embd, config.n_embd))
            return {f"{name}_qk": qk, f"{name}_v": v}
    return {name: tensor}


def _mismatch(missing: list[str], surplus: list[str]) -> str:
    def few(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    parts = [f"lacks {few(missing)}"] if missing else []
    parts += [f"has {few(surplus)}, which config.json does not account for"] if surplus else []
    return "the weights do not fit config.json: the file " + "; it ".join(parts) + "."


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def state_to_hf(model: Transformer) -> dict[str, Tensor]:
    """The state dict of the stock class. Biases that the model does not have are zeros, which is exact."""
    config, form = model.config, layout(model.config)
    state: dict[str, Tensor] = {}
    for ours, theirs in form.modules(config).items():
        module = model.get_submodule(ours)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if ours == "wte":
            weight = weight[: model.vocab_used]
        state[f"{theirs}.weight"] = _theirs(ours, weight, config, form)
        if ours not in ("wte", "wpe"):
            bias = module.bias if module.bias is not None else weight.new_zeros(weight.size(0))
            state[f"{theirs}.bias"] = _theirs(ours, bias, config, form)  # type: ignore[arg-type]
    state["lm_head.weight"] = model.head_weight[: model.vocab_used]
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


def _theirs(module: str, tensor: Tensor, config: ModelConfig, form: Layout) -> Tensor:
    if form.interleaved_qkv and module.endswith(QKV):
        tensor = _by_head(tensor, config.n_head)
    if form.transposed and module.startswith("blocks.") and tensor.dim() == 2:
        tensor = tensor.t()
    return tensor

"""`ModelConfig` and the `config.json` of GPT-2 and GPT-NeoX, one from the other.

Whatever would change a logit and cannot be said on the other side is refused by name, in both directions. Dropout comes
along as it is: GPT-2's own is 0.1.
"""

from typing import Any

from normfree.config import DropoutConfig, InitConfig, ModelConfig, resolve_model
from normfree.errors import UserError, unknown

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM"}  # by model_type
HF_LEAKY_SLOPE = 0.01  # what Hugging Face's "leaky_relu" is fixed to

ACT_TO_HF = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "relu2": "relu2",
    "identity": "linear",
}
# Other names for the same functions.
ACT_FROM_HF = {theirs: ours for ours, theirs in ACT_TO_HF.items()} | {
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}

# Keys that change the computation, and the only value that our model computes (also what a missing key means).
FIXED = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "gpt_neox": {"attention_bias": True},
}
REQUIRED = {
    "gpt2": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    "gpt_neox": (
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ),
}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """The model of a `config.json`; `UserError` names every setting that our model does not compute.

    Optional keys that are missing mean what they mean to transformers. All rows of the vocabulary count as in use.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UserError(unknown("model_type", family, ARCHITECTURES))
    missing = [name for name in REQUIRED[family] if values.get(name) is None]
    if missing:
        raise UserError(f"config.json of a {family} model lacks {', '.join(missing)}.")
    problems = [*_shape_problems(values, family), *_import_problems(values, family)]
    if problems:
        raise UserError("this Hugging Face model cannot be imported:\n" + "\n".join(problems))
    config = _from_gpt2(values) if family == "gpt2" else _from_gpt_neox(values)
    return resolve_model(config)


def _shape_problems(values: dict[str, Any], family: str) -> list[str]:
    problems = [
        f"{name}={values[name]!r} must be a whole number of at least 1."
        for name in REQUIRED[family]
        if type(values[name]) is not int or values[name] < 1
    ]
    width, heads = ("n_embd", "n_head") if family == "gpt2" else ("hidden_size", "num_attention_heads")
    if not problems and values[width] % values[heads]:
        problems.append(f"{width}={values[width]} is no multiple of {heads}={values[heads]}.")
    return problems


def _import_problems(values: dict[str, Any], family: str) -> list[str]:
    problems = [
        f"{name}={values[name]!r}: only {only!r} is supported."
        for name, only in FIXED[family].items()
        if values.get(name, only) != only
    ]
    act_key = "activation_function" if family == "gpt2" else "hidden_act"
    act = values.get(act_key)
    if act is not None and (not isinstance(act, str) or act not in ACT_FROM_HF):
        problems.append(f"{act_key}: " + unknown("activation", act, ACT_FROM_HF))
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            problems.append(f"{name}={rope!r} is no object.")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f"{name}: rope type {kind!r} is not supported, only 'default'.")
    if values.get("quantization_config"):
        problems.append(
            "quantization_config: quantised weights are not supported; save the model in fp32, fp16 or bf16."
        )
    return problems


def _from_gpt2(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        n_inner=values.get("n_inner"),
        block_size=values["n_positions"],
        vocab_size=values["vocab_size"],
        vocab_used=values["vocab_size"],
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        act=ACT_FROM_HF[values.get("activation_function") or "gelu_new"],
        act_slope=HF_LEAKY_SLOPE,
        tie_embeddings=values.get("tie_word_embeddings", True),
        dropout=DropoutConfig(
            embed=values.get("embd_pdrop", 0.1),
            attn=values.get("attn_pdrop", 0.1),
            resid=values.get("resid_pdrop", 0.1),
        ),
        init=InitConfig(std=values.get("initializer_range", 0.02)),
    )


def _from_gpt_neox(values: dict[str, Any]) -> ModelConfig:
    rope = values.get("rope_parameters") or {}  # transformers 5; before it: rotary_pct and rotary_emb_base
    hidden_dropout = values.get("hidden_dropout", 0.0)
    config = ModelConfig(
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_embd=values["hidden_size"],
        n_inner=values["intermediate_size"],
        block_size=values["max_position_embeddings"],
        vocab_size=values["vocab_size"],
        vocab_used=values["vocab_size"],
        norm_eps=values.get("layer_norm_eps", 1e-5),
        act=ACT_FROM_HF[values.get("hidden_act") or "gelu"],
        act_slope=HF_LEAKY_SLOPE,
        positions="rotary",
        rotary_pct=rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25)),
        rotary_base=float(rope.get("rope_theta", values.get("rotary_emb_base", 10000.0))),
        parallel_residual=values.get("use_parallel_residual", True),
        tie_embeddings=values.get("tie_word_embeddings", False),
        dropout=DropoutConfig(embed=hidden_dropout, attn=values.get("attention_dropout", 0.0), resid=hidden_dropout),
        init=InitConfig(std=values.get("initializer_range", 0.02)),
    )
    if config.rotary_dim == 0:
        raise UserError(f"rotary_pct={config.rotary_pct} turns none of the {config.head_dim} dimensions of a head.")
    return config


# ----------------------------------------------------------------------------------------------------------------------


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of the stock class that computes the same; `UserError` names every key that none can express.

    Learned positions become GPT-2, rotary ones GPT-NeoX. Absent biases are no obstacle: the weights get zeros. Rows
    that only pad the vocabulary are left out.
    """
    config = resolve_model(config)
    problems = _export_problems(config)
    if problems:
        raise UserError("this model cannot be a stock Hugging Face model:\n" + "\n".join(problems))
    family = "gpt2" if config.positions == "learned" else "gpt_neox"
    common = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "vocab_size": config.vocab_used or config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init.std,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return common | (_to_gpt2(config) if family == "gpt2" else _to_gpt_neox(config))


def _export_problems(config: ModelConfig) -> list[str]:
    neox = config.positions == "rotary"
    checks = [
        (config.norm == "layernorm", f"model.norm={config.norm}: their blocks always have a layernorm."),
        (config.placement == "pre", f"model.placement={config.placement}: their norms stand before each sublayer."),
        (config.final_norm == "layernorm", f"model.final_norm={config.final_norm}: theirs is always a layernorm."),
        (config.act in ACT_TO_HF, f"model.act={config.act}: they have only {', '.join(sorted(ACT_TO_HF))}."),
        (
            config.act != "leaky_relu" or config.act_slope == HF_LEAKY_SLOPE,
            f"model.act_slope={config.act_slope}: their leaky_relu is fixed to {HF_LEAKY_SLOPE}.",
        ),
        (config.act_beta == 1.0, f"model.act_beta={config.act_beta}: they have no such scale."),
        (config.embed_scale == 1.0, f"model.embed_scale={config.embed_scale}: they have no such scale."),
        (
            neox or not config.parallel_residual,
            "model.parallel_residual=True: only GPT-NeoX has it, and there positions are rotary, not learned.",
        ),
        (
            not neox or config.dropout.embed == config.dropout.resid,
            f"model.dropout.embed={config.dropout.embed}: GPT-NeoX has one probability for it and for "
            f"model.dropout.resid={config.dropout.resid}; make them equal (they do not matter after training).",
        ),
    ]
    return [message for ok, message in checks if not ok]


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "n_positions": config.block_size,
        "activation_function": ACT_TO_HF[config.act],
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout.embed,
        "attn_pdrop": config.dropout.attn,
        "resid_pdrop": config.dropout.resid,
    }


def _to_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "max_position_embeddings": config.block_size,
        "hidden_act": ACT_TO_HF[config.act],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_base,
        "hidden_dropout": config.dropout.resid,
        "attention_dropout": config.dropout.attn,
    }

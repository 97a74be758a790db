"""Every setting of a run, as typed dataclasses.

Torch and Hydra are not imported here: a mistake is found (`normfree.rules`) before either costs a second. Each key says
in one line what it does, and whether it can change the trained weights: those keys name the run directory, and a
resumed run must agree with its checkpoint on all of them (`max_steps` aside, which `resume=` may extend).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from normfree.errors import UserError, unknown
from normfree.kinds import fits, misfit, shown
from normfree.tables import STATISTICS

VOCAB_MULTIPLE = 64  # matrix products are fastest on multiples of 64; the added logits are masked
DEFAULT_SEQ_LEN = 128  # the papers' context length
IGNORED = -100  # a target that takes no part in the loss


def key(default: Any, help: str, *, weights: bool = True) -> Any:
    """A setting: its default, one line of help, and whether it can change the trained weights."""
    metadata = {"help": help, "weights": weights}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type) -> Any:
    return field(default_factory=cls)


@dataclass
class BiasConfig:
    """Biases, per kind of matrix. GPT-2 and Pythia: all on. The papers' GPT-2: only `qk`."""

    qk: bool = key(True, "queries and keys")
    v: bool = key(True, "values")
    attn_proj: bool = key(True, "output of attention")
    mlp_fc: bool = key(True, "input of the feed-forward layer")
    mlp_proj: bool = key(True, "output of the feed-forward layer")


@dataclass
class DropoutConfig:
    """Dropout probabilities in [0, 1)."""

    embed: float = key(0.0, "on the sum of token and position embedding")
    attn: float = key(0.0, "on attention probabilities (entropy is of the distribution before it)")
    resid: float = key(0.0, "on what each sublayer adds to the residual stream")


@dataclass
class InitConfig:
    """Distribution of the initial weights; `normfree.model.init.init_weights` has the table."""

    std: float | None = key(None, "standard deviation of matrices and embeddings; null: sqrt(2 / (5 n_embd))")
    depth_scaled: bool = key(True, "divide the std of matrices that write to the residual stream by sqrt(2 n_layer)")


@dataclass
class ModelConfig:
    """Shape and choices of one `normfree.model.Transformer`. The defaults are GPT-2's at size nano."""

    n_layer: int = key(4, "blocks")
    n_head: int = key(4, "attention heads a block")
    n_embd: int = key(96, "width of the residual stream")
    n_inner: int | None = key(None, "width of the feed-forward layer; null: 4 n_embd")
    block_size: int = key(256, "positions the model has")
    vocab_size: int | None = key(None, "rows of the embedding; null: the tokenizer's, rounded up to a multiple of 64")
    vocab_used: int | None = key(None, "token ids in use, the rest are masked; null: the tokenizer's, else vocab_size")
    norm: str = key("layernorm", "normalization inside the blocks")
    placement: str = key("pre", "where the blocks' norms stand: pre (before each sublayer) or none")
    final_norm: str | None = key(None, "norm before the head; null: like norm, but layernorm where norm is none")
    norm_eps: float = key(1e-5, "epsilon of every norm, inside the root")
    act: str = key("gelu_tanh", "activation of the feed-forward layer")
    act_slope: float = key(0.01, "negative slope of leaky_relu; start value of learnable_leaky_relu")
    act_scope: str = key("per_layer", "owner of learned slopes: per_layer, or global (one parameter for all blocks)")
    act_beta: float = key(1.0, "act(b x)/b: the input scale an activation sees")
    embed_scale: float = key(1.0, "factor on the embedding output (not on a tied head)")
    positions: str = key("learned", "learned (an embedding) or rotary")
    rotary_pct: float = key(0.25, "share of each head that rotary positions turn")
    rotary_base: float = key(10000.0, "base of the rotary wavelengths")
    parallel_residual: bool = key(False, "attention and feed-forward read the same residual stream (GPT-NeoX)")
    tie_embeddings: bool = key(True, "the head is the token embedding")
    loss: str = key("cross_entropy", "training loss")
    bias: BiasConfig = group(BiasConfig)
    dropout: DropoutConfig = group(DropoutConfig)
    init: InitConfig = group(InitConfig)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = key("python_stdlib", "where text comes from")
    path: str | None = key(None, "source=files: a file, a folder or a glob; source=codeparrot: a local copy")
    text_column: str = key("content", "column of the text in .jsonl, .json.gz and .parquet")
    tokenizer: str = key(
        "code8k", "code8k, gpt2, bytes, trained, or the path of a tokenizer.json or of a run's tokenizer/"
    )
    vocab_size: int = key(8192, "vocabulary of tokenizer=trained")
    seq_len: int | None = key(None, "tokens a training sequence; null: 128, or block_size where that is less")
    chunks: str = key("packed", "packed (documents joined by end-of-text) or original (exact-length chunks, no joins)")
    max_documents: int | None = key(None, "take only so many documents of each split; null: all")
    fingerprint: str | None = key(None, "sha256 of the tokenised corpus; filled in; set it to accept only that corpus")
    cache_dir: str | None = key(None, "where tokens are kept; null: ~/.cache/normfree", weights=False)


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = key(3e-3, "peak learning rate")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-8, "AdamW's epsilon")
    weight_decay: float = key(0.1, "decoupled decay of matrices and embeddings")
    decay_slopes: bool | float = key(
        False, "decay of learned slopes: false, true (as matrices, as in the original), a number"
    )
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping")
    schedule: str = key("cosine", "learning rate after warm-up")
    warmup_steps: int | None = key(None, "linear warm-up; null: warmup_fraction of the run")
    warmup_fraction: float = key(0.1, "warm-up as a share of max_steps, where warmup_steps is null")
    lr_final: float = key(0.0, "learning rate at the end, as a share of the peak")
    decay_fraction: float = key(0.2, "schedule=wsd: share of the steps after warm-up in the final decay")


@dataclass
class TrainConfig:
    """Length, batch, and how the numbers are computed."""

    max_steps: int = key(300, "optimizer steps")
    batch_size: int = key(16, "sequences an optimizer step")
    micro_batch_size: int | None = key(None, "sequences a forward pass; null: batch_size (no accumulation)")
    precision: str = key("auto", "fp32, bf16, fp16 (with loss scaling), or auto: bf16 on CUDA, else fp32")
    eval_every: int = key(100, "steps between evaluations; 0: only at the end", weights=False)
    eval_tokens: int = key(32768, "validation tokens of an evaluation, always the same ones", weights=False)
    checkpoint_every: int = key(100, "steps between checkpoints; 0: only at the end", weights=False)
    keep_checkpoints: int = key(2, "newest checkpoints to keep, besides the best", weights=False)
    fast: bool = key(True, "bf16 on CUDA: fused loss, attention, activation, AdamW; false: PyTorch's", weights=False)
    compile: bool | str = key("auto", "auto: where CUDA, Triton and a C compiler are; true; false", weights=False)
    deterministic: bool | None = key(None, "bit-exact repetition; null: on the CPU", weights=False)
    device: str = key("auto", "auto, cpu or cuda", weights=False)
    gpus: int = key(1, "GPUs of one run (only 1 for now)", weights=False)


@dataclass
class DiagnosticsConfig:
    """What is measured inside the model. Nothing here changes the weights."""

    every: int = key(20, "steps between records; 0: none", weights=False)
    snapshot_every: int = key(
        100, "steps between snapshots (entropy by position, quantiles, width), where a record is due too", weights=False
    )
    statistics: list[str] | None = key(None, "which statistics are recorded; null: every one there is", weights=False)
    probe_sequences: int = key(16, "validation sequences of the fixed probe, in eval mode; 0: none", weights=False)
    watch: str | None = key(
        None,
        "at every step: all (entropy, flags), residual (maximum and counts of blocks) or off; null: all on CUDA, else "
        "residual",
        weights=False,
    )
    ring: int = key(64, "steps that the flight recorder holds, for a postmortem", weights=False)
    warn_factor: float = key(
        5.0, "warn when a layer's residual maximum exceeds its recent median so many times", weights=False
    )
    warn_window: int = key(32, "steps that recent is", weights=False)


@dataclass
class LogConfig:
    """Views of the record. `metrics.jsonl` and `arrays/` are always written."""

    tensorboard: bool = key(True, "write tensorboard/", weights=False)
    every: int = key(10, "steps between lines of train/loss, lr, grad_norm", weights=False)
    wandb: str = key("off", "off, offline or online", weights=False)
    wandb_project: str = key("normfree", "Weights & Biases project", weights=False)
    figures: bool = key(True, "draw the figures when training ends", weights=False)
    sample_prompt: str = key("def ", "start of the sample generated when training ends", weights=False)


@dataclass
class RollbackConfig:
    """nan_policy=rollback: back to the last good checkpoint, without the batch that went wrong."""

    retries: int = key(3, "how often at most; then the run stops as under raise")
    lr_factor: float = key(0.25, "factor on the learning rate after a rollback; those of several multiply")
    steps: int = key(200, "for how many steps after the bad one")


@dataclass
class InjectConfig:
    """One value that is not finite, planted on purpose, to see that it is found; a replay plants it again."""

    step: int | None = key(None, "the optimizer step that meets it; null: nothing is planted")
    module: str | None = key(None, "a module (blocks.1.mlp.fc), its .weight or that weight's .exp_avg; list: show all")
    phase: str = key("forward", "forward, backward (a gradient) or optimizer (a moment)")
    value: str = key("nan", "nan, inf or -inf")


@dataclass
class DebugConfig:
    """For tests of the reports on faults."""

    inject: InjectConfig = group(InjectConfig)


@dataclass
class Config:
    """One run."""

    name: str | None = key(None, "what figures call the run; null: <model>-<size>-<norm>-<act>", weights=False)
    seed: int = key(1, "governs initial weights, data order and dropout", weights=False)
    run_dir: str | None = key(None, "where to write; null: runs/<name>-<hash of the settings>-s<seed>", weights=False)
    resume: str | None = key(None, "continue this run directory; train.max_steps may be raised", weights=False)
    init_from: str | None = key(None, "start from the weights of this run or checkpoint")
    nan_policy: str = key(
        "raise",
        "on a loss or gradient that is not finite: raise (stop), skip (the step), rollback (to the last good "
        "checkpoint, at a lower rate) or log (go on regardless)",
    )
    spike_sigma: float | None = key(
        None, "a loss so many standard deviations above its last 64 counts as a bad step too; null: never"
    )
    rollback: RollbackConfig = group(RollbackConfig)
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    optim: OptimConfig = group(OptimConfig)
    train: TrainConfig = group(TrainConfig)
    diagnostics: DiagnosticsConfig = group(DiagnosticsConfig)
    log: LogConfig = group(LogConfig)
    debug: DebugConfig = group(DebugConfig)


# ----------------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = Config) -> Any:
    """The dataclass of a saved configuration; one `UserError` names every key and type that is not of this version."""
    faults = list(_dict_faults(values, cls))
    if faults:
        raise UserError("\n".join(faults))
    return _build(values, cls)


def _dict_faults(values: Any, cls: type, prefix: str = "") -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"{prefix.rstrip('.') or 'the configuration'} is no mapping of keys to values."
        return
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in known:
            yield unknown("key", f"{prefix}{name!s:.60}", [prefix + other for other in known])
        elif dataclasses.is_dataclass(known[name].type):
            yield from _dict_faults(value, known[name].type, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif not fits(value, known[name].type):
            yield misfit(prefix + name, value, known[name].type)


def _build(values: dict[str, Any], cls: type) -> Any:
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    nested = {name for name in values if dataclasses.is_dataclass(kinds[name])}
    return cls(**{k: _build(v, kinds[k]) if k in nested else v for k, v in values.items()})  # type: ignore[arg-type]


def type_faults(config: Any, cls: type = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for every value of a configuration that is not of its key's type; sections too."""
    for f in dataclasses.fields(cls):
        name, value = prefix + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(f.type):
            if isinstance(value, f.type):  # type: ignore[arg-type]
                yield from type_faults(value, f.type, f"{name}.")  # type: ignore[arg-type]
            else:
                yield name, f"{name}={shown(value)} is no {f.type.__name__}."  # type: ignore[union-attr]
        elif not fits(value, f.type):
            yield name, misfit(name, value, f.type)


def flat_keys(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Every (dotted key, value, whether it can change the weights)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flat_keys(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, f.metadata["weights"]


def help_lines(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """One line a key: its name, a star where it changes the weights, its default and meaning."""
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield from help_lines(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            value = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[operator]
            default = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            star = "*" if f.metadata["weights"] else " "
            yield f"{star} {prefix + f.name + '=' + default:36} {f.metadata['help']}"


def round_up(n: int, multiple: int = VOCAB_MULTIPLE) -> int:
    return -(-n // multiple) * multiple


def resolve_model(model: ModelConfig) -> ModelConfig:
    """A copy with the nulls that follow from other keys of the model filled in."""
    model = from_dict(to_dict(model), ModelConfig)
    if model.n_inner is None:
        model.n_inner = 4 * model.n_embd
    if model.final_norm is None:
        model.final_norm = "layernorm" if model.norm == "none" else model.norm
    if model.init.std is None:
        model.init.std = math.sqrt(2 / (5 * model.n_embd))
    return model


def resolve(config: Config) -> Config:
    """A copy in which every null that follows from other settings is filled in (not: device, precision, vocabulary)."""
    config = from_dict(to_dict(config))
    data, optim, train = config.data, config.optim, config.train
    config.model = resolve_model(config.model)
    if data.seq_len is None:
        data.seq_len = min(config.model.block_size, DEFAULT_SEQ_LEN)
    if optim.warmup_steps is None:
        optim.warmup_steps = round(optim.warmup_fraction * train.max_steps)
    if train.micro_batch_size is None:
        train.micro_batch_size = train.batch_size
    if config.diagnostics.statistics is None:
        config.diagnostics.statistics = list(STATISTICS)
    return config


def resolve_vocabulary(config: Config, n_vocab: int) -> None:
    """Fill in `model.vocab_size` and `model.vocab_used` from the tokenizer's `n_vocab`, in place."""
    model = config.model
    if model.vocab_size is None:
        model.vocab_size = round_up(n_vocab)
    if model.vocab_used is None:
        model.vocab_used = n_vocab
    if not n_vocab <= model.vocab_used <= model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} (of which model.vocab_used={model.vocab_used}) cannot hold the "
            f"{n_vocab} ids of data.tokenizer={config.data.tokenizer}. Leave both null, or raise them to {n_vocab}."
        )

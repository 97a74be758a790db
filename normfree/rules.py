"""What settings may be: the range or choices of each key, and the rules between keys. Imports no torch."""

import math
from collections.abc import Callable, Iterator

from normfree.config import Config, flat_keys, type_faults
from normfree.errors import UserError, unknown
from normfree.kinds import shown
from normfree.tables import ACTIVATIONS, LOSSES, NORMS, SCHEDULES, SOURCES, STATISTICS, Table

KEYS = dict.fromkeys(name for name, _, _ in flat_keys(Config()))  # in their order

CHOICES: dict[str, Table | tuple[str, ...]] = {
    "model.norm": NORMS,
    "model.final_norm": NORMS,
    "model.act": ACTIVATIONS,
    "model.loss": LOSSES,
    "model.placement": ("pre", "none"),
    "model.positions": ("learned", "rotary"),
    "model.act_scope": ("per_layer", "global"),
    "data.source": SOURCES,
    "data.chunks": ("packed", "original"),
    "optim.schedule": SCHEDULES,
    "train.precision": ("auto", "fp32", "bf16", "fp16"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.compile": ("auto", "true", "false"),
    "diagnostics.watch": ("all", "residual", "off"),
    "log.wandb": ("off", "offline", "online"),
    "nan_policy": ("raise", "skip", "rollback", "log"),
    "debug.inject.phase": ("forward", "backward", "optimizer"),
    "debug.inject.value": ("nan", "inf", "-inf"),
}

# key: (lowest, highest, is the lowest itself allowed, is the highest)
RANGES = {
    "model.n_layer": (1, 10_000, True, True),
    "model.n_head": (1, 10_000, True, True),
    "model.n_embd": (1, 10**6, True, True),
    "model.n_inner": (1, 10**7, True, True),
    "model.block_size": (1, 10**7, True, True),
    "model.vocab_size": (2, 10**7, True, True),
    "model.vocab_used": (2, 10**7, True, True),
    "model.norm_eps": (0, 1, False, True),
    "model.act_slope": (-10, 10, True, True),
    "model.act_beta": (0, math.inf, False, False),
    "model.embed_scale": (0, math.inf, False, False),
    "model.rotary_pct": (0, 1, False, True),
    "model.rotary_base": (1, math.inf, False, False),
    "model.dropout.embed": (0, 1, True, False),
    "model.dropout.attn": (0, 1, True, False),
    "model.dropout.resid": (0, 1, True, False),
    "model.init.std": (0, 100, True, True),
    "data.vocab_size": (257, 10**6, True, True),
    "data.seq_len": (1, 10**7, True, True),
    "data.max_documents": (1, 10**12, True, True),
    "optim.lr": (0, 1e3, False, True),
    "optim.beta1": (0, 1, True, False),
    "optim.beta2": (0, 1, True, False),
    "optim.eps": (0, 1, False, True),
    "optim.weight_decay": (0, 1e3, True, True),
    "optim.decay_slopes": (0, 1e3, True, True),
    "optim.grad_clip": (0, math.inf, True, False),
    "optim.warmup_steps": (0, 10**12, True, True),
    "optim.warmup_fraction": (0, 1, True, True),
    "optim.lr_final": (0, 1, True, True),
    "optim.decay_fraction": (0, 1, True, True),
    "train.max_steps": (1, 10**12, True, True),
    "train.batch_size": (1, 10**9, True, True),
    "train.micro_batch_size": (1, 10**9, True, True),
    "train.eval_every": (0, 10**12, True, True),
    "train.eval_tokens": (1, 10**12, True, True),
    "train.checkpoint_every": (0, 10**12, True, True),
    "train.keep_checkpoints": (1, 10**12, True, True),
    "train.gpus": (1, 1, True, True),
    "log.every": (1, 10**12, True, True),
    "diagnostics.every": (0, 10**12, True, True),
    "diagnostics.snapshot_every": (0, 10**12, True, True),
    "diagnostics.ring": (1, 10**6, True, True),
    "diagnostics.warn_factor": (1, math.inf, False, False),
    "diagnostics.warn_window": (2, 10**6, True, True),
    "diagnostics.probe_sequences": (0, 10**6, True, True),
    "debug.inject.step": (0, 10**12, True, True),
    "spike_sigma": (0, math.inf, False, False),
    "rollback.retries": (0, 16, True, True),
    "rollback.lr_factor": (0, 1, False, True),
    "rollback.steps": (0, 10**9, True, True),
    "seed": (0, 2**63 - 1, True, True),
}


# Texts that name a file or a folder.
PATHS = (
    "data.path",
    "data.tokenizer",
    "data.cache_dir",
    "run_dir",
    "resume",
    "init_from",
    "name",
)
LONGEST_PART, LONGEST_PATH = 200, 4000  # bytes; systems take 255 and 4096, and a run adds to its name


def value_faults(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it), key by key: type, choice, range, text."""
    wrong = dict(type_faults(config))
    yield from wrong.items()
    if wrong.keys() - KEYS:  # a whole section
        return
    values = {name: value for name, value, _ in flat_keys(config)}
    for name, value in values.items():
        if value is None or name in wrong:
            continue
        if name in CHOICES:
            text = str(value).lower() if isinstance(value, bool) else value  # train.compile=true is a bool
            if text not in CHOICES[name]:
                yield name, f"{name}: " + unknown("choice", value, CHOICES[name])
        elif name in RANGES:
            low, high, low_ok, high_ok = RANGES[name]
            # NaN is inside nothing.
            if not ((low <= value if low_ok else low < value) and (value <= high if high_ok else value < high)):
                bounds = f"{'[' if low_ok else '('}{low:g}, {high:g}{']' if high_ok else ')'}"
                yield name, f"{name}={shown(value)} is outside {bounds}."
        elif name == "diagnostics.statistics":
            strangers = [unknown("statistic", item, STATISTICS) for item in value if item not in STATISTICS]
            if strangers:
                yield name, f"{name}: {' '.join(strangers)}"
        elif isinstance(value, str) and (fault := _text_fault(value, name)):
            yield name, f"{name}={shown(value)} {fault}."


def _text_fault(text: str, name: str) -> str | None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "has half a surrogate pair, which is no character"
    if name not in PATHS:
        return None
    if any(ord(c) < 32 for c in text):
        return "has a control character, which no file should have in its name"
    if size > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in text.split("/")):
        return f"is too long for a file ({LONGEST_PART} bytes a part, {LONGEST_PATH} in all)"
    if name == "name" and ("/" in text or text.startswith(".")):
        return "becomes a folder under runs/: no '/', and no '.' at the start"
    return None


def cross_faults(config: Config, bad: set[str]) -> Iterator[str]:
    """Rules between keys; one that is `bad` by itself is not looked at, nor blamed twice."""
    model, data, optim, train = config.model, config.data, config.optim, config.train

    def legal(*names: str) -> bool:
        return not bad.intersection(names)

    if legal("model.n_embd", "model.n_head"):
        if model.n_embd % model.n_head:
            yield f"model.n_embd={model.n_embd} is not divisible by model.n_head={model.n_head}."
        elif (
            legal("model.positions", "model.rotary_pct")
            and model.positions == "rotary"
            and (model.rotary_dim < 2 or model.rotary_dim % 2)
        ):
            yield (
                f"model.rotary_pct={model.rotary_pct} turns {model.rotary_dim} of the {model.head_dim} dimensions of a "
                "head; rotary positions need an even number, at least 2."
            )
    if legal("data.seq_len", "model.block_size") and data.seq_len is not None and data.seq_len > model.block_size:
        yield f"data.seq_len={data.seq_len} is longer than model.block_size={model.block_size}."
    if (
        legal("optim.warmup_steps", "train.max_steps")
        and optim.warmup_steps is not None
        and optim.warmup_steps > train.max_steps
    ):
        yield f"optim.warmup_steps={optim.warmup_steps} is longer than the run (train.max_steps={train.max_steps})."
    micro = train.micro_batch_size
    if legal("train.batch_size", "train.micro_batch_size") and micro is not None and train.batch_size % micro:
        yield f"train.batch_size={train.batch_size} is not a multiple of train.micro_batch_size={micro}."
    used, rows = model.vocab_used, model.vocab_size
    if legal("model.vocab_size", "model.vocab_used") and used is not None and rows is not None and used > rows:
        yield f"model.vocab_used={used} is more than model.vocab_size={rows}."
    if legal("data.chunks", "data.seq_len") and data.chunks == "original" and data.seq_len == 1:
        yield "data.chunks=original: a chunk of data.seq_len=1 token has nothing to predict."
    if legal("data.source", "data.path") and data.source == "files" and data.path is None:
        yield "data.path is null, but data.source=files needs a file, a folder or a glob."
    yield from _inject_faults(config, legal)


def _inject_faults(config: Config, legal: Callable[..., bool]) -> Iterator[str]:
    inject, train = config.debug.inject, config.train
    if not legal("debug.inject.step", "debug.inject.module"):
        return
    if (inject.step is None) != (inject.module is None):
        yield "debug.inject needs both step and module (or neither)."
    elif inject.step is not None and legal("train.max_steps") and inject.step >= train.max_steps:
        yield f"debug.inject.step={inject.step} is never reached: the last step is {train.max_steps - 1}."
    if inject.step is not None and inject.phase == "backward" and train.precision == "fp16":
        yield "debug.inject.phase=backward: under train.precision=fp16 the loss scaler takes it for an overflow."


def faults(config: Config) -> list[str]:
    """Everything that is wrong with a configuration, one line each. Touches no file and no device."""
    problems = dict(value_faults(config))
    if problems.keys() - KEYS:  # a whole section
        return list(problems.values())
    return [*problems.values(), *cross_faults(config, set(problems))]


def validate(config: Config) -> None:
    """Raise one `UserError` that names every fault of the configuration. Touches no file and no device."""
    if messages := faults(config):
        raise UserError("\n".join(messages))

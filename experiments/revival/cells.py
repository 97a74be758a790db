"""The cells of experiments/relu_revival.py: what one training run of the study is, by scale and rung.

A cell is the words of `run.py` that make it (without the place of the text), a peak learning rate and a seed. Its name,
`A/gelu/lr1e-3/s1`, is rung, arm, rate, seed. Which cells there are is plan.py's; here is how each is made.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from normfree.cli import check_overrides
from normfree.config import Config, OptimConfig, from_dict, resolve, to_dict
from normfree.identity import weights_hash
from normfree.rules import KEYS, validate
from normfree.training.schedules import learning_rate
from revival.tuning import rate_name

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 101  # of the runs that choose a rate: never one of the seeds that are reported

# The schedule of the authors' code: 2.1 billion tokens.
PUBLISHED_STEPS, PUBLISHED_WARMUP, PUBLISHED_LR, PUBLISHED_FINAL = 32260, 1613, 1e-3, 1e-4
PUBLISHED_DECAY = 0.1  # of weights, and of learned slopes too
PUBLISHED_T = 128
PREFIX_STEPS = 3226  # a tenth
SHORT_STEPS, SHORT_WARMUP = 800, 200  # of scale short, where not said otherwise

# Settings that change no weight, but what a result says of them; every recipe sets them.
MEASURING = ("train.eval_every", "train.eval_tokens", "diagnostics.every", "diagnostics.probe_sequences")


@dataclass(frozen=True)
class Recipe:
    """What the cells of a rung have in common at one scale. `step_seconds`, `other_seconds`: expected on an H200."""

    groups: tuple[str, ...]  # words of run.py that choose files of conf/
    keys: dict[str, Any]  # settings
    steps: int
    tokens_a_step: int
    step_seconds: float
    other_seconds: float  # start, compilation, evaluation
    tuning_tokens: int  # of val: what the trainer evaluates, and rates are chosen by
    report_tokens: int  # of what follows them in val, and of val_package: what tables show
    head_sequences: int  # on which each head's attention is replaced

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_a_step

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.other_seconds


@dataclass(frozen=True)
class Arm:
    """A name, and the settings that make the recipe this arm. Where both set a key, the arm does."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)


_settings: dict[tuple[str, ...], str] = {}  # words of a cell -> Cell.settings, which takes milliseconds


@dataclass(frozen=True)
class Cell:
    """One training run."""

    rung: str
    arm: Arm
    recipe: Recipe
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rung}/{self.arm.name}/lr{rate_name(self.lr)}/s{self.seed}"

    @property
    def tuning(self) -> bool:
        return self.seed == TUNING_SEED

    @property
    def keys(self) -> dict[str, Any]:
        own = {"optim.lr": float(rate_name(self.lr)), "seed": self.seed}
        return self.recipe.keys | self.arm.keys | own

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides of `run.py`, without the place of the text."""
        return (*self.recipe.groups, *(word(name, value) for name, value in self.keys.items()))

    @property
    def settings(self) -> str:
        """Hash of the settings that change the weights, seed and place of the text aside."""
        words = replace(self, seed=1).words
        if words not in _settings:
            _settings[words] = weights_hash(config_of(self))
        return _settings[words]

    def key(self, fingerprint: str | None, by_length: Mapping[int, str] | None = None) -> str:
        """What a result is known by: settings, seed, corpus, and how much is measured, which decides what it says.

        `by_length`: data.seq_len -> fingerprint, where the text is cut into chunks of that length.
        """
        recipe = self.recipe
        measured = [recipe.tuning_tokens, recipe.report_tokens, recipe.head_sequences]
        measured += [self.keys[name] for name in MEASURING]
        corpus = (by_length or {}).get(self.keys.get("data.seq_len", 0), fingerprint)
        told = [self.settings, self.seed, corpus, measured]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def wanted(self, patterns: Sequence[str]) -> bool:
        """Whether a pattern names this cell; without patterns every cell is wanted."""
        return not patterns or any(is_named(self.name, pattern) for pattern in patterns)

    def missing_keys(self) -> list[str]:
        """Settings that this version of the framework does not have, and the cell needs."""
        return [name for name in self.keys if name not in KEYS]


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern means a cell of this name: `A`, `A/gelu` and `A/gelu/lr1e-3` stand for all that is below."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")


def word(name: str, value: Any) -> str:
    """`name=value` as it is typed."""
    if value is None or isinstance(value, bool):
        return f"{name}={json.dumps(value)}"
    if isinstance(value, list):
        return f"{name}=[{','.join(value)}]"
    return f"{name}={rate_name(value)}" if name == "optim.lr" else f"{name}={value}"


def config_of(cell: Cell) -> Config:
    """The cell's resolved and validated configuration; the place of the text is not in it. Raises `UserError`.

    The same as what `run.py` makes of the cell's words, in a hundredth of the time: cells share their files of conf/.
    """
    config: Config = from_dict(to_dict(_composed(cell.recipe.groups)))
    for name, value in cell.keys.items():
        *sections, leaf = name.split(".")
        target: Any = config
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, leaf), name
        setattr(target, leaf, value)
    config = resolve(config)
    validate(config)
    return config


@cache
def _composed(groups: tuple[str, ...]) -> Config:
    config = check_overrides(list(groups), multirun=False)
    assert config is not None
    return config


# -- recipes -----------------------------------------------------------------------------------------------------------

QUIET = {  # what is written and measured; nothing of it changes a weight
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 1,
    "log.every": 1,  # with the number of bad steps up to each
    "log.tensorboard": False,
    "log.figures": False,
    "diagnostics.snapshot_every": 0,
    "diagnostics.probe_sequences": 32,
    "diagnostics.statistics": ["attn_entropy", "max_score", "nan_count", "inf_count", "resid_rms", "mlp_pre_std"],
}
# The probe passes every ten steps: ten in a row span what the trainer's policy takes to give up.
MEASURED = QUIET | {"diagnostics.every": 10, "diagnostics.watch": "residual"}
# The place of the text is put in when a cell runs; its hash takes these.
TEXT = {
    "data.tokenizer": "code32k.json",
    "data.chunks": "packed",
    "data.max_documents": None,
}
PYTHIA, GPT2 = ("experiment=paper_pythia",), ("experiment=paper_gpt2",)
FILES = ("data=files", "data.path=corpus")


def length(steps: int, warmup: int) -> dict[str, Any]:
    """Steps, warm-up, and an evaluation at every quarter."""
    return {"train.max_steps": steps, "optim.warmup_steps": warmup, "train.eval_every": steps // 4}


def prefix_final(steps: int) -> float:
    """`optim.lr_final` with which `steps` steps are the beginning of the published schedule, which goes on.

    After the warm-up it is a straight line from 1 to `PUBLISHED_FINAL` over the rest of the published steps.
    """
    share = (steps - PUBLISHED_WARMUP) / (PUBLISHED_STEPS - PUBLISHED_WARMUP)
    return 1 + (PUBLISHED_FINAL - 1) * share


def slope_decay(config: OptimConfig, steps: int) -> float:
    """The decay of slopes for which a run shrinks them as much as the published one does.

    Decoupled decay multiplies a weight by the product of 1 - rate x decay: the sum of rate x decay is what is equal.
    """
    published = OptimConfig(lr=PUBLISHED_LR, warmup_steps=PUBLISHED_WARMUP, schedule="linear", lr_final=PUBLISHED_FINAL)
    total = sum(learning_rate(step, PUBLISHED_STEPS, published) for step in range(PUBLISHED_STEPS)) * PUBLISHED_DECAY
    return total / sum(learning_rate(step, steps, config) for step in range(steps))


_SMOKE_MEASURED = {"diagnostics.probe_sequences": 8, "diagnostics.every": 2, "diagnostics.watch": "residual"}
SMOKE = Recipe(
    groups=("model=gpt2", "size=nano", "data=python_stdlib"),
    keys={
        "data.tokenizer": "bytes",
        "data.seq_len": 64,
        "train.precision": "fp32",
        "train.eval_tokens": 8192,
        "nan_policy": "skip",
        **length(20, 2),
        **QUIET,
        **_SMOKE_MEASURED,
    },
    steps=20,
    tokens_a_step=16 * 64,
    step_seconds=0.2,
    other_seconds=5,
    tuning_tokens=8192,
    report_tokens=16384,
    head_sequences=16,
)
_SHORT = {"nan_policy": "skip", **TEXT, "train.precision": "bf16", "train.eval_tokens": 524288, **MEASURED}
SHORT_PYTHIA = Recipe(
    groups=(*PYTHIA, *FILES),
    keys={**_SHORT, "train.micro_batch_size": 512, **length(SHORT_STEPS, SHORT_WARMUP)},
    steps=SHORT_STEPS,
    tokens_a_step=512 * 128,
    step_seconds=0.045,
    other_seconds=45,
    tuning_tokens=524288,
    report_tokens=1048576,
    head_sequences=128,
)
LONG_WARMUP = SHORT_STEPS // 2  # the share of it that the prefix of the published schedule has
SHORT_WARM = replace(SHORT_PYTHIA, keys=SHORT_PYTHIA.keys | length(SHORT_STEPS, LONG_WARMUP))
_T256 = {"data.seq_len": 256, "train.batch_size": 256, "train.micro_batch_size": 256}
SHORT_T256 = replace(SHORT_PYTHIA, keys=SHORT_PYTHIA.keys | _T256, step_seconds=0.05, head_sequences=64)
_SHORT_GPT2 = Recipe(
    groups=(*GPT2, *FILES),
    keys={**_SHORT, "train.micro_batch_size": 512},
    steps=PREFIX_STEPS,
    tokens_a_step=512 * 128,
    step_seconds=0.095,
    other_seconds=90,
    tuning_tokens=524288,
    report_tokens=1048576,
    head_sequences=128,
)


def gpt2(keys: dict[str, Any], steps: int) -> Recipe:
    """GPT-2 124M at scale short; `keys` hold the schedule."""
    return replace(_SHORT_GPT2, keys=_SHORT_GPT2.keys | keys, steps=steps)


def full(groups: tuple[str, ...], step_seconds: float, seq_len: int = PUBLISHED_T) -> Recipe:
    """The published recipe on CodeParrot; only what is measured is added.

    A step has 512 sequences whatever their length, and the text is read once: longer ones take fewer steps. The warm-up
    is a share of them.
    """
    steps = PUBLISHED_STEPS * PUBLISHED_T // seq_len
    every = {"diagnostics.every": 100, "train.eval_every": steps // 4, "train.eval_tokens": 1048576}
    return Recipe(
        groups=groups,
        keys={"nan_policy": "skip", "data.seq_len": seq_len, "train.max_steps": steps, **QUIET, **every},
        steps=steps,
        tokens_a_step=512 * seq_len,
        step_seconds=step_seconds,
        other_seconds=300,
        tuning_tokens=1048576,
        report_tokens=4194304,
        head_sequences=128,
    )

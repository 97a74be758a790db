"""Configurations out of the schema: a key that is added to it is drawn from by itself."""

import math
from copy import deepcopy
from functools import cache
from typing import Any

from hypothesis import strategies as st

from normfree import cli
from normfree.config import Config, flat_keys, to_dict
from normfree.rules import CHOICES, RANGES

DEFAULTS = {name: value for name, value, _ in flat_keys(Config())}

# Keys whose whole range would make a model or a run too large for a test, or that name something outside.
SMALL: dict[str, list[Any]] = {
    "model.n_layer": [1, 2],
    "model.n_head": [1, 2],
    "model.n_embd": [4, 8],
    "model.n_inner": [None, 1, 5],
    "model.block_size": [8, 9],
    "model.vocab_size": [None, 257, 264],
    "model.vocab_used": [None, 257],
    "model.rotary_pct": [1.0, 0.5],
    "data.seq_len": [1, 2, 8],
    "data.source": ["files"],
    "data.chunks": ["packed"],
    "data.max_documents": [None, 2, 10**12],
    "train.batch_size": [1, 4],
    "train.micro_batch_size": [None, 1],
    "train.max_steps": [1],
    "train.eval_tokens": [1, 8],
    "train.device": ["auto", "cpu"],
    "train.compile": ["false", False, "auto"],
    "train.gpus": [1],
    "diagnostics.ring": [1, 3],
    "diagnostics.probe_sequences": [0, 1],
    "diagnostics.warn_window": [2, 5],
    "log.wandb": ["off"],
    "optim.warmup_steps": [None, 0, 1],
    "debug.inject.step": [None],
}
FIXED = {"data.path", "data.tokenizer", "data.fingerprint", "data.cache_dir", "run_dir", "resume", "init_from"}
FIXED |= {"debug.inject.module", "diagnostics.statistics", "log.figures", "log.tensorboard"}


def allowed(name: str) -> st.SearchStrategy[Any]:
    """Values of a key that are valid by themselves: its choices, or the ends of its range and what lies between."""
    default = DEFAULTS[name]
    if name in SMALL:
        return st.sampled_from(SMALL[name])
    if name in CHOICES:
        return st.sampled_from([default, *CHOICES[name]])
    if name in RANGES:
        low, high, low_ok, high_ok = RANGES[name]
        if isinstance(default, int) and not isinstance(default, bool):
            return st.integers(int(low), int(min(high, 2**63 - 1)))
        high = 1e6 if math.isinf(high) else high
        floats = st.floats(low, high, exclude_min=not low_ok, exclude_max=not high_ok, allow_subnormal=False)
        return st.one_of(st.booleans() if isinstance(default, bool) else st.just(default), floats)
    if isinstance(default, bool):
        return st.booleans()
    return st.just(default) if default is None else st.one_of(st.just(default), st.text(st.characters(codec="utf-8")))


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 10**5000, 2**63, -1, 0]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.8e308]),
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "\ud800", "x" * 300, "x/" * 3000, "${oc.env:HOME}", "???", "~nobody/x", "İ", "NaN", "on"]
    ),
    st.binary(max_size=4),
    st.lists(st.one_of(st.text(max_size=4), st.integers()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with some keys set, to values of any type."""
    config = deepcopy(config)
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        target: Any = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, leaf, value)
    return config


def as_saved(changes: dict[str, Any]) -> dict[str, Any]:
    """The defaults as a saved file has them, with some keys, known or not, set to anything."""
    values = to_dict(Config())
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        target: Any = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                break
        else:
            target[leaf] = value
    return values


_compose = cli._compose
_composed = cache(lambda words: _compose(list(words)))


def composed_before(words: list[str]) -> Any:
    """In place of `cli._compose`: the same words are composed once (a quarter of a second) for all tests."""
    return deepcopy(_composed(tuple(words)))

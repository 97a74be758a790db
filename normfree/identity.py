"""Which settings make a run what it is: its hash, and what tells two configurations apart."""

import hashlib
import json
from typing import Any

from normfree.config import Config, flat_keys


def weights_settings(config: Config) -> dict[str, Any]:
    """Every setting that can change the weights of this run: those that name nothing in it are left out."""
    settings = {name: value for name, value, weights in flat_keys(config) if weights}
    if config.debug.inject.step is None:  # nothing is planted: these keys name nothing
        settings = {name: value for name, value in settings.items() if not name.startswith("debug.")}
    if config.nan_policy == "rollback":
        settings["train.checkpoint_every"] = config.train.checkpoint_every  # where it goes back to
    else:
        settings = {name: value for name, value in settings.items() if not name.startswith("rollback.")}
    if config.spike_sigma is None:
        del settings["spike_sigma"]
    return settings


def weights_hash(config: Config) -> str:
    """First 8 hex digits of the sha256 of every resolved setting that can change the weights, the seed aside."""
    settings = weights_settings(config)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def weights_differences(ours: Config, theirs: Config) -> list[str]:
    """The keys, seed included, in which two configurations would train different weights: `key: ours, not theirs`."""
    return _differences(ours, theirs, weights=True)


def other_differences(ours: Config, theirs: Config) -> list[str]:
    """The keys that a resumed run may change, its length too, `resume` and `run_dir` aside, in which two differ."""
    longer = [line for line in _differences(ours, theirs, weights=True) if line.startswith("train.max_steps:")]
    found = [*longer, *_differences(ours, theirs, weights=False)]
    return [line for line in found if not line.startswith(("resume:", "run_dir:"))]


def _differences(ours: Config, theirs: Config, weights: bool) -> list[str]:
    """`weights`: in what can change those of either, or in the rest."""
    changing = {"seed", *weights_settings(ours), *weights_settings(theirs)}
    other = {name: value for name, value, _ in flat_keys(theirs)}
    return [
        f"{name}: {value!r}, not {other[name]!r}"
        for name, value, _ in flat_keys(ours)
        if (name in changing) == weights and value != other[name]
    ]

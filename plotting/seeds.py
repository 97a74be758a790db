"""Runs that differ only in the seed: which they are, which of them were lost, and mean and interval over them."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from normfree.config import Config, flat_keys
from normfree.errors import UserError
from normfree.identity import weights_hash, weights_settings
from normfree.runs import Run, is_evaluation, is_lost

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_TABLE = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
DEFAULTS = {name: value for name, value, _ in flat_keys(Config())}
NORMAL = 1.959964  # the same quantile of the normal distribution


@dataclass
class Group:
    """Runs of one configuration, in the order given, one a seed."""

    label: str
    runs: list[Run]

    @property
    def lost(self) -> int:
        return sum(is_lost(run) for run in self.runs)

    @property
    def count(self) -> str:
        """How many runs there are and how many were lost, in words."""
        n = len(self.runs)
        if n == 1:
            return f"seed {self.runs[0].config.seed}" + (", lost" if self.lost else "")
        return f"{n} seeds" + (f", {self.lost} of {n} lost" if self.lost else "")


def final(run: Run, metric: str) -> float:
    """The metric at the last recorded step; NaN where it was not recorded there, however good it was before."""
    return float(run.metrics[metric].iloc[-1]) if metric in run.metrics else math.nan


def trained(runs: Sequence[Run]) -> list[Run]:
    """Without evaluations, which are no further sample of training; they are named on stderr."""
    kept = [run for run in runs if not is_evaluation(run)]
    if not kept:
        raise UserError(f"{runs[0].directory} is an evaluation, and so are all that were named: name runs.")
    for run in runs:
        if is_evaluation(run):
            print(f"{run.directory}: an evaluation, left out", file=sys.stderr)
    return kept


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups of equal settings that can change the weights, the seed aside, in order of first appearance."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(weights_hash(run.config), []).append(run)
    for same in members.values():
        _refuse_repeats(same)
        _refuse_other_contents(same)
    names = _names([same[0] for same in members.values()])
    return [Group(name, same) for name, same in zip(names, members.values(), strict=True)]


def _refuse_repeats(runs: Sequence[Run]) -> None:
    seen: dict[int, Run] = {}
    for run in runs:
        other = seen.setdefault(run.config.seed, run)
        if other is not run:
            raise UserError(
                f"{other.directory} and {run.directory} have the same settings and the same seed {run.config.seed}: "
                "they are not two samples. Name one of them."
            )


def _refuse_other_contents(runs: Sequence[Run]) -> None:
    """Settings name a plug-in's choices and the run of `init_from`, and not what these hold."""
    for what, found in (("plug-ins", _plugins), ("an init_from", _origin)):
        other = next((run for run in runs if found(run) != found(runs[0])), None)
        if other is not None:
            raise UserError(
                f"{runs[0].directory} and {other.directory} have the same settings, and {what} of other contents: they "
                "are not two samples of one configuration. Name one of them."
            )


def _plugins(run: Run) -> set[str]:
    return {plugin["sha256"] for plugin in run.status.get("plugins", [])}


def _origin(run: Run) -> str | None:
    return (run.status.get("origin") or {}).get("manifest")


def differing_keys(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Settings that can change the weights (the seed aside) and are not equal in all runs: key -> value of each run.

    None of a run in which the setting names nothing.
    """
    settings = [weights_settings(run.config) for run in runs]
    names = dict.fromkeys(name for found in settings for name in found if name != "seed")
    columns = {name: [found.get(name) for found in settings] for name in names}
    return {name: values for name, values in columns.items() if any(v != values[0] for v in values)}


def _names(runs: Sequence[Run]) -> list[str]:
    """The runs' names without a seed at the end; to those that are equal the keys are added in which they differ."""
    plain = [run.name.removesuffix(f"-s{run.config.seed}") for run in runs]
    settings = [weights_settings(run.config) for run in runs]
    names = list(plain)
    for name in dict.fromkeys(plain):
        same = [i for i, other in enumerate(plain) if other == name]
        for key, values in differing_keys([runs[i] for i in same]).items():
            everywhere = all(key in settings[i] for i in same)  # else a default says nothing
            for i, value in zip(same, values, strict=True):
                if key in settings[i] and (everywhere or value != DEFAULTS[key]):
                    names[i] += f", {key.partition('.')[2] or key}={value}"
    return names


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: from the table, beyond it by the expansion around the normal (error < 1e-4)."""
    assert degrees >= 1, "an interval needs at least two samples"
    if degrees <= len(T_TABLE):
        return T_TABLE[degrees - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(samples: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half width of the 95 % t interval over axis 0; the half width of a single sample is NaN."""
    values = np.asarray(samples, dtype=np.float64)
    n = len(values)
    if n < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), t_quantile(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)

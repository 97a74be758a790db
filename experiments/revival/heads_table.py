"""What replacing heads costs, over runs: numbers for the table and the verdict on overloaded heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normfree.heads import OVERLOADED, relative_entropy
from revival import words
from revival.cases import not_far
from revival.records import Record, is_lost, numbers

SMALL = 1e-3  # nats: a head that costs less when replaced does next to nothing
KINDS = ("uniform", "mean")


@dataclass(frozen=True)
class Costs:
    """One entry a head of every run: its level, its cost by kind of replacement (nats)."""

    level: np.ndarray
    uniform: np.ndarray
    mean: np.ndarray

    @property
    def overloaded(self) -> np.ndarray:
        return self.level >= OVERLOADED


def replaceable(records: Sequence[Record]) -> list[Record]:
    """The runs whose heads were replaced; not those that are far off, which have little that could be lost."""
    return [r for r in not_far(records) if not is_lost(r) and r.get("heads")]


def costs(records: Sequence[Record]) -> Costs:
    level = [relative_entropy(numbers(r["entropy"]), r["T"]).ravel() for r in records]
    uniform, mean = ([numbers(r["heads"][kind]).ravel() for r in records] for kind in KINDS)
    return Costs(np.concatenate(level), np.concatenate(uniform), np.concatenate(mean))


def at_once(records: Sequence[Record], kind: str) -> dict[int, float]:
    """seed -> cost of replacing all overloaded heads of a run together; runs without any are left out."""
    found = {r["seed"]: r["heads"][f"all_{kind}"] for r in records}
    return {seed: float(cost) for seed, cost in found.items() if cost is not None}


def per_seed(records: Sequence[Record], kind: str, overloaded: bool) -> dict[int, float]:
    """seed -> mean cost over the heads of its run that are overloaded, or over those that are not; runs without any
    are left out.
    """
    means = {}
    for record in records:
        found = costs([record])
        part = getattr(found, kind)[found.overloaded == overloaded]
        if len(part):
            means[record["seed"]] = float(part.mean())
    return means


def summary(records: Sequence[Record]) -> list[str]:
    """Means over seeds of each run's mean head, with 95 % t intervals; dashes where no run survived."""
    found = costs(records) if records else None
    cells = [f"{int(found.overloaded.sum())} of {len(found.level)}" if found else words.DASH]
    for overloaded in (True, False):
        cells += [words.mean(per_seed(records, kind, overloaded), 5) for kind in KINDS]
    errors = [numbers(r["heads"]["uniform_error"]).ravel() for r in records if "uniform_error" in r["heads"]]
    error = f"{np.median(np.concatenate(errors)):.5f}" if errors else words.DASH
    return [*cells, error, *(words.mean(at_once(records, kind), 4) for kind in KINDS)]

"""What replacing heads costs, over runs: numbers for the table and the verdict on overloaded heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normfree.heads import relative_entropy
from revival import words
from revival.records import Record, numbers

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
        return self.level >= 0.75


def costs(records: Sequence[Record]) -> Costs:
    level = [relative_entropy(numbers(r["entropy"]), r["T"]).ravel() for r in records]
    uniform, mean = ([numbers(r["heads"][kind]).ravel() for r in records] for kind in KINDS)
    return Costs(np.concatenate(level), np.concatenate(uniform), np.concatenate(mean))


def at_once(records: Sequence[Record], kind: str) -> dict[int, float]:
    """seed -> cost of replacing all overloaded heads of a run together; runs without any are left out."""
    found = {r["seed"]: r["heads"][f"all_{kind}"] for r in records}
    return {seed: float(cost) for seed, cost in found.items() if cost is not None}


def summary(records: Sequence[Record]) -> list[str]:
    found = costs(records)
    cells = [f"{int(found.overloaded.sum())} of {len(found.level)}"]
    for chosen in (found.overloaded, ~found.overloaded):
        for kind in KINDS:
            part = getattr(found, kind)[chosen]
            cells.append(words.signed(float(part.mean()), 5) if len(part) else words.DASH)
    return cells + [words.mean(at_once(records, kind), 4) for kind in KINDS]

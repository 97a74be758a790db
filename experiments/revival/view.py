"""The results of one scale on one corpus, asked by arm: what tables, figures and verdicts are made of."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normfree.heads import is_overloaded
from revival import records as store
from revival.records import Record, is_lost, same_rate
from revival.statistics import Difference, paired
from revival.tuning import best_rate, common_rate, is_interior

SCALES = ("short", "full", "smoke")  # in the order of the page
FOUR = ("ln+gelu", "ln+relu", "gelu", "relu")


@dataclass(frozen=True)
class View:
    """`records`: one for each cell, all on the corpus `fingerprint`."""

    scale: str
    fingerprint: str
    records: tuple[Record, ...]

    def rungs(self) -> list[str]:
        return sorted({record["rung"] for record in self.records})

    def arms(self, rung: str) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(record["arm"] for record in self.records if record["rung"] == rung))

    def reported(self, rung: str, arm: str, lr: float | None = None) -> list[Record]:
        """The runs of the reported seeds, by rate and seed."""
        found = [r for r in self.records if (r["rung"], r["arm"]) == (rung, arm) and not r["tuning"]]
        kept = [r for r in found if lr is None or same_rate(r["lr"], lr)]
        return sorted(kept, key=lambda r: (r["lr"], r["seed"]))

    def tuning(self, rung: str, arm: str) -> dict[float, float]:
        """Rate -> mean loss over the tuning seeds, on the tokens that rates are chosen by; infinite if one was lost."""
        by_rate: dict[float, list[float]] = {}
        for r in self.records:
            if (r["rung"], r["arm"]) == (rung, arm) and r["tuning"]:
                by_rate.setdefault(r["lr"], []).append(math.inf if is_lost(r) else float(r["tuning_loss"]))
        return {lr: statistics.fmean(found) for lr, found in sorted(by_rate.items())}

    def own_rate(self, rung: str, arm: str) -> float | None:
        """The rate that was chosen for the arm, or the one it was given; None where neither is known."""
        tried = self.tuning(rung, arm)
        if tried:
            return best_rate(tried)
        rates = {record["lr"] for record in self.reported(rung, arm)}
        return rates.pop() if len(rates) == 1 else None

    def is_settled(self, rung: str, arm: str) -> bool:
        """Whether the arm's rate has a worse or lost one on both sides, or was never a matter of choice."""
        tried = self.tuning(rung, arm)
        return not tried or is_interior(tried)

    def own(self, rung: str, arm: str) -> list[Record]:
        """The reported runs at the arm's own rate."""
        lr = self.own_rate(rung, arm)
        return [] if lr is None else self.reported(rung, arm, lr)

    def common_rate(self, rung: str, arms: Sequence[str] = FOUR) -> float | None:
        """The rate of the lowest sum over the arms, among those that none of them lost."""
        tried = [self.tuning(rung, arm) for arm in arms]
        return common_rate(tried) if all(tried) else None

    def gap(self, ours: Sequence[Record], theirs: Sequence[Record], name: str = "val_loss") -> Difference | None:
        """Paired difference in nats over the seeds that neither lost; `name`: val_loss, val_package_loss, 25, 50."""
        return paired(values(ours, name), values(theirs, name))


def values(records: Iterable[Record], name: str = "val_loss") -> dict[int, float]:
    """seed -> a number of the runs that were not lost: a field, or the loss at 25, 50 or 100 % of the run."""
    found = {}
    for record in records:
        value = record["losses"].get(name) if name in ("25", "50", "100") else record.get(name)
        if not is_lost(record) and value is not None:
            found[record["seed"]] = float(value)
    return found


def overload(records: Iterable[Record]) -> dict[int, float]:
    """seed -> share of heads at or above three quarters of the ceiling, at the end of the run."""
    kept = [record for record in records if not is_lost(record)]
    return {r["seed"]: float(is_overloaded(store.numbers(r["entropy"]), r["T"]).mean()) for r in kept}


def mean_entropy(records: Iterable[Record]) -> dict[int, float]:
    kept = [record for record in records if not is_lost(record)]
    return {r["seed"]: float(np.nanmean(store.numbers(r["entropy"]))) for r in kept}


def lost(records: Sequence[Record]) -> tuple[int, int]:
    """How many of how many."""
    return sum(map(is_lost, records)), len(records)


def views(out: Path) -> list[View]:
    """One view for each scale and corpus: results of different texts never share a table. A repeated cell counts once,
    the last time; where settings changed under the same name, the last ones count.
    """
    found = []
    for scale in SCALES:
        records = store.read(out, scale)
        for fingerprint in dict.fromkeys(record["fingerprint"] for record in records):
            newest: dict[tuple, str] = {}
            cells: dict[str, Record] = {}
            for record in (r for r in records if r["fingerprint"] == fingerprint):
                newest[record["rung"], record["arm"], record["lr"]] = record["settings"]
                cells[record["name"]] = record
            kept = [r for r in cells.values() if newest[r["rung"], r["arm"], r["lr"]] == r["settings"]]
            found.append(View(scale, fingerprint, tuple(kept)))
    return found

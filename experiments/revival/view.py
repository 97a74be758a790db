"""The results of one scale on one corpus, asked by arm: what tables, figures and verdicts are made of."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normfree.heads import is_overloaded, relative_entropy
from revival import records as store
from revival.records import Record, is_lost, same_rate
from revival.statistics import Difference, paired
from revival.tuning import REFINED, best_rate, common_rate, is_interior

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
        """Arms of one recipe together, in the order of the four; workers finish in any order."""
        return sorted({record["arm"] for record in self.records if record["rung"] == rung}, key=_place)

    def of(self, rung: str, arm: str) -> list[Record]:
        """All runs of an arm; of a rung that refines another one, those of the other too."""
        return [r for r in self.records if r["rung"] in (rung, REFINED.get(rung)) and r["arm"] == arm]

    def is_refined(self, rung: str) -> bool:
        """Whether each of the four arms was tried at two rates or more of the rung's own: before, nothing is said."""
        rates = {(r["arm"], r["lr"]) for r in self.records if r["rung"] == rung and r["tuning"]}
        return all(sum(arm == other for other, _ in rates) > 1 for arm in FOUR)

    def reported(self, rung: str, arm: str, lr: float | None = None) -> list[Record]:
        """The runs of the reported seeds, by rate and seed."""
        found = [r for r in self.of(rung, arm) if not r["tuning"]]
        kept = [r for r in found if lr is None or same_rate(r["lr"], lr)]
        return sorted(kept, key=lambda r: (r["lr"], r["seed"]))

    def tuning(self, rung: str, arm: str) -> dict[float, float]:
        """Rate -> mean loss over the tuning seeds, on the tokens that rates are chosen by; infinite if one was lost."""
        by_rate: dict[float, list[float]] = {}
        for r in self.of(rung, arm):
            if r["tuning"]:
                by_rate.setdefault(r["lr"], []).append(math.inf if is_lost(r) else float(r["tuning_loss"]))
        return {lr: statistics.fmean(found) for lr, found in sorted(by_rate.items())}

    def own_rate(self, rung: str, arm: str) -> float | None:
        """The rate that was chosen for the arm, or the one it was given; None where neither is known."""
        tried = self.tuning(rung, arm)
        if tried:
            return best_rate(tried)
        rates = [r["lr"] for r in self.of(rung, arm)]
        return rates[-1] if rates else None  # given by another rung, which may have changed its mind: the last counts

    def is_settled(self, rung: str, arm: str) -> bool:
        """Whether the arm's rate has a worse or lost one on both sides, or was given to it."""
        tried = self.tuning(rung, arm)
        return not tried or is_interior(tried)

    def own(self, rung: str, arm: str) -> list[Record]:
        """The reported runs at the arm's own rate; none of a rung that refines another one, and has not done so yet."""
        lr = self.own_rate(rung, arm)
        if lr is None or (rung in REFINED and not self.is_refined(rung)):
            return []
        return self.reported(rung, arm, lr)

    def common_rate(self, rung: str, arms: Sequence[str] = FOUR) -> float | None:
        """The rate of the lowest sum over the arms, among those that none lost; None where another rung has it."""
        if rung in REFINED:
            return None
        tried = [self.tuning(rung, arm) for arm in arms]
        return common_rate(tried) if all(tried) else None

    def gap(self, ours: Sequence[Record], theirs: Sequence[Record], name: str = "val_loss") -> Difference | None:
        """Paired difference over the seeds that neither lost, of which both runs are comparable; in nats for losses.

        `name`: what `values` knows.
        """
        apart = set(unlike(ours, theirs))
        one, other = values(ours, name), values(theirs, name)
        return paired({seed: value for seed, value in one.items() if seed not in apart}, other)


def base_of(arm: str) -> str:
    """Which of the four an arm was made of; empty where it is none of theirs."""
    rest = arm.rpartition(":")[2]
    return max((name for name in FOUR if rest.startswith(name)), key=len, default="")


def _place(arm: str) -> tuple[str, int, str]:
    recipe, _, rest = arm.rpartition(":")
    base = base_of(arm)
    return recipe, FOUR.index(base) if base else len(FOUR), rest


ALIKE = ("planned_tokens", "val_tokens", "T")  # equal in runs that are paired


def unlike(ours: Iterable[Record], theirs: Iterable[Record]) -> list[int]:
    """Seeds that both have and neither lost, but whose runs were not planned and evaluated alike: never paired."""
    one, other = ({r["seed"]: r for r in records if not is_lost(r)} for records in (ours, theirs))
    shared = sorted(set(one) & set(other))
    return [s for s in shared if any(one[s].get(name) != other[s].get(name) for name in ALIKE)]


QUARTERS = ("25", "50", "100")


NEAR = 0.9  # of the ceiling
OF_HEADS: dict[str, Callable[[np.ndarray, int], float]] = {
    "overload": lambda entropy, T: is_overloaded(entropy, T).mean(),
    "near": lambda entropy, T: (relative_entropy(entropy, T) >= NEAR).mean(),
    "entropy": lambda entropy, T: np.nanmean(entropy),
}


def values(records: Iterable[Record], name: str = "val_loss") -> dict[int, float]:
    """seed -> a finite number of the runs that were not lost. `name`: a field of the record; 25, 50 or 100, the loss
    at that percentage of the run; at its end overload, the share of overloaded heads, near, that of heads near the
    ceiling, and entropy, the mean of all.
    """
    found = {}
    for record in records:
        value = None if is_lost(record) else _value(record, name)
        if value is not None and math.isfinite(value):
            found[record["seed"]] = value
    return found


def _value(record: Record, name: str) -> float | None:
    if name in OF_HEADS:
        return float(OF_HEADS[name](store.numbers(record["entropy"]), record["T"]))
    value = record["losses"].get(name) if name in QUARTERS else record.get(name)
    return None if value is None else float(value)  # float reads "NaN" and "Infinity"


FAR = 1.0  # nats above its arm's median


def far_off(records: Sequence[Record]) -> dict[int, float]:
    """seed -> loss of the runs that were not lost and learned next to nothing beside others of their arm."""
    nats = values(records)
    limit = statistics.median(nats.values()) + FAR if nats else math.inf
    return {seed: loss for seed, loss in nats.items() if loss > limit}


def overload(records: Iterable[Record]) -> dict[int, float]:
    """seed -> share of heads at or above three quarters of the ceiling, at the end of the run."""
    return values(records, "overload")


def mean_entropy(records: Iterable[Record]) -> dict[int, float]:
    return values(records, "entropy")


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

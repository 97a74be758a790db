"""What rungs are made of: results by cell, arms with the rates they are tried at, and what is next for them.

Cells that are done are yielded again; `plan` leaves them out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from revival.cells import SEEDS, TUNING_SEED, Arm, Cell, Recipe, is_named
from revival.records import Record, is_lost
from revival.tuning import REFINED, best_rate, common_rate, rates_to_try


class Results:
    """What has been trained, by cell: on this corpus, with exactly these settings."""

    def __init__(
        self,
        records: Sequence[Record],
        fingerprint: str | None,
        seeds: Sequence[int] = SEEDS,
        by_length: Mapping[int, str] | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.by_length = by_length  # see Cell.key
        self.seeds = tuple(seeds)  # those that are wanted
        self._by_key = {record["key"]: record for record in records}
        self._rates = {record["lr"] for record in records if record["tuning"]}

    def key(self, cell: Cell) -> str:
        return cell.key(self.fingerprint, self.by_length)

    def of(self, cell: Cell) -> Record | None:
        return self._by_key.get(self.key(cell))

    def tuning(self, study: "Study") -> dict[float, float]:
        """Rate -> loss on the tokens that rates are chosen by; infinite where the run was lost."""
        rungs = study.rung, REFINED.get(study.rung)  # a cell's key does not tell its rung, and A2's cells are like A's
        tried = {lr: self.of(study.cell(lr, TUNING_SEED)) for lr in sorted(self._rates)}
        found = {lr: r for lr, r in tried.items() if r is not None and r["rung"] in rungs}
        return {lr: math.inf if is_lost(r) else float(r["tuning_loss"]) for lr, r in found.items()}


@dataclass(frozen=True)
class Waiting:
    """Cells of one recipe that will follow once something is known. Their rates, and so their names, are not."""

    rung: str
    arms: tuple[str, ...]
    recipe: Recipe
    seeds: tuple[int, ...]
    reason: str

    @property
    def cells(self) -> int:
        return len(self.arms) * len(self.seeds)

    @property
    def seconds(self) -> float:
        return self.cells * self.recipe.seconds

    @property
    def why(self) -> str:
        return f"{', '.join(self.arms)}: {self.reason}"

    def wanted(self, patterns: Sequence[str]) -> "Waiting":
        """With those arms alone of which a pattern may name a cell, whatever its rate will be."""
        return replace(self, arms=tuple(arm for arm in self.arms if not patterns or self._may_name(arm, patterns)))

    def _may_name(self, arm: str, patterns: Sequence[str]) -> bool:
        parts = [pattern.split("/") for pattern in patterns]
        any_rate = ["/".join([*p[:2], *("*" for _ in p[2:3]), *p[3:]]) for p in parts]
        names = [f"{self.rung}/{arm}/lr/s{seed}" for seed in (*self.seeds, TUNING_SEED)]
        return any(is_named(name, pattern) for name in names for pattern in any_rate)


@dataclass(frozen=True)
class Study:
    """An arm of a rung, and the rates it is tried at."""

    rung: str
    arm: Arm
    recipe: Recipe
    ladder: tuple[float, ...]

    def cell(self, lr: float, seed: int) -> Cell:
        return Cell(self.rung, self.arm, self.recipe, lr, seed)


Steps = Iterator[Cell | Waiting]

# -- what rungs are made of --------------------------------------------------------------------------------------------


def chosen(study: Study, results: Results) -> float | None:
    """The arm's own best rate, once its optimum is settled."""
    losses = results.tuning(study)
    return None if rates_to_try(study.ladder, losses) else best_rate(losses)


def tuned(studies: Sequence[Study], results: Results, common: bool = False) -> Steps:
    """Rates first, arm by arm in turns; then every seed at each arm's own best, then at the common rate."""
    tried = [results.tuning(s) for s in studies]
    yield from (s.cell(lr, TUNING_SEED) for s, losses in zip(studies, tried, strict=True) for lr in losses)
    missing = [rates_to_try(s.ladder, losses) for s, losses in zip(studies, tried, strict=True)]
    wanted = [[s.cell(lr, TUNING_SEED) for lr in rates] for s, rates in zip(studies, missing, strict=True)]
    yield from (cell for turn in zip_longest(*wanted) for cell in turn if cell is not None)
    best = {s.arm.name: chosen(s, results) for s in studies}
    for seed in results.seeds:
        yield from (s.cell(lr, seed) for s in studies if (lr := best[s.arm.name]) is not None)
    unsettled = [s for s, cells in zip(studies, wanted, strict=True) if cells]
    if unsettled:
        yield later(unsettled, results, "at their own best rates, once chosen")
    if unsettled and common:
        yield later(studies, results, "at the common rate (less where it is an arm's own)")
    elif common and (lr := common_rate(tried)) is not None:
        for seed in results.seeds:
            yield from (s.cell(lr, seed) for s in studies)


def later(studies: Sequence[Study], results: Results, reason: str) -> Waiting:
    """`studies`: of one rung and recipe."""
    first = studies[0]
    return Waiting(first.rung, tuple(s.arm.name for s in studies), first.recipe, results.seeds, reason)


def fixed(studies: Sequence[tuple[Study, float | None]], results: Results) -> Steps:
    """Every seed at a rate that is given; None: it is still to be chosen on another rung."""
    for seed in results.seeds:
        yield from (study.cell(lr, seed) for study, lr in studies if lr is not None)
    if open_ := [study for study, lr in studies if lr is None]:
        yield later(open_, results, "at rates that rung A is still choosing")

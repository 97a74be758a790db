"""What of the ladder can be trained next, what waits for something, and what needs a setting that is not there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from normfree.errors import UserError
from revival.cells import Cell
from revival.rungs import LADDER
from revival.study import Results, Waiting


@dataclass
class Plan:
    """`cells`: to be trained now, in order of value."""

    cells: list[Cell] = field(default_factory=list)
    done: list[Cell] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    impossible: dict[str, list[Cell]] = field(default_factory=dict)  # key that is missing -> cells that need it

    @property
    def seconds(self) -> float:
        return sum(cell.recipe.seconds for cell in self.cells)

    @property
    def later(self) -> list[str]:
        """What waits, in words."""
        return [f"{w.cells} cells of rung {w.rung}, {w.seconds / 3600:.1f} GPU-hours: {w.why}" for w in self.waiting]

    def has(self, pattern: str) -> bool:
        """Whether a pattern names a cell that is done, ready, or may be named so once its rate is known."""
        named = [*self.cells, *self.done, *(cell for cells in self.impossible.values() for cell in cells)]
        return any(cell.wanted([pattern]) for cell in named) or any(w.wanted([pattern]).arms for w in self.waiting)


def plan(scale: str, results: Results, patterns: Sequence[str] = ()) -> Plan:
    """The cells of a scale that `patterns` name (`A`, `A/gelu*`; none: all), each once."""
    found, seen = Plan(), set[str]()
    for steps in LADDER[scale].values():
        for step in steps(results):
            if isinstance(step, Waiting):
                found.waiting += [step] if (step := step.wanted(patterns)).arms else []
            elif step.name not in seen and step.wanted(patterns):
                seen.add(step.name)
                _place(step, results, found)
    return found


def _place(cell: Cell, results: Results, found: Plan) -> None:
    if missing := cell.missing_keys():
        for name in missing:
            found.impossible.setdefault(name, []).append(cell)
    elif results.of(cell) is not None:
        found.done.append(cell)
    else:
        found.cells.append(cell)


def check_patterns(scale: str, results: Results, patterns: Sequence[str]) -> None:
    """Raise `UserError` for a pattern that names no cell there is or may be, with the nearest arms."""
    found = plan(scale, results, patterns)
    for pattern in patterns:
        if found.has(pattern):
            continue
        everything = plan(scale, results)
        arms = [f"{cell.rung}/{cell.arm.name}" for cell in (*everything.cells, *everything.done)]
        arms += [f"{step.rung}/{arm}" for step in everything.waiting for arm in step.arms]
        near = get_close_matches("/".join(pattern.split("/")[:2]), dict.fromkeys(arms), cutoff=0.5)
        raise UserError(
            f"--cells {pattern} names no cell of scale {scale}. A cell is rung/arm/rate/seed"
            + (f"; near it: {', '.join(near)}" if near else "")
            + f". Rungs: {', '.join(LADDER[scale])}; --dry-run lists their cells."
        )

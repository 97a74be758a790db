"""What of the ladder can be trained next, what waits for something, and what needs a setting that is not there."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from revival.cells import Cell
from revival.rungs import LADDER
from revival.study import Results, Waiting


@dataclass
class Plan:
    """`cells`: to be trained now, in order of value."""

    cells: list[Cell] = field(default_factory=list)
    done: list[Cell] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    impossible: dict[str, list[str]] = field(default_factory=dict)  # key that is missing -> names of cells

    @property
    def seconds(self) -> float:
        return sum(cell.recipe.seconds for cell in self.cells)


def plan(scale: str, results: Results, patterns: Sequence[str] = ()) -> Plan:
    """The cells of a scale that `patterns` name (`A`, `A/gelu*`; none: all), each once, without those that are done."""
    found, seen = Plan(), set[str]()
    for rung, steps in LADDER[scale].items():
        if patterns and not any(pattern.split("/")[0] in (rung, "*") for pattern in patterns):
            continue
        for step in steps(results):
            if isinstance(step, Waiting):
                found.waiting.append(step)
            elif step.name not in seen and step.wanted(patterns):
                seen.add(step.name)
                _place(step, results, found)
    return found


def _place(cell: Cell, results: Results, found: Plan) -> None:
    if missing := cell.missing_keys():
        for name in missing:
            found.impossible.setdefault(name, []).append(cell.name)
    elif results.of(cell) is not None:
        found.done.append(cell)
    else:
        found.cells.append(cell)

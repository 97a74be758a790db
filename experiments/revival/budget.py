"""What a cell of each rung costs: expected of its recipe, and measured where cells have run."""

import statistics
from collections.abc import Sequence

from revival import words
from revival.plan import Plan, plan
from revival.records import Record, is_lost
from revival.study import Results
from revival.view import View

STUDIES = ("short", "full")


def costs(found: Sequence[View]) -> list[str]:
    """A row a rung: device minutes a cell, the same for tuning and reported cells but for the heads' evaluation."""
    rows = []
    for scale in STUDIES:
        fresh = plan(scale, Results([], None))
        rungs = {cell.rung for cell in fresh.cells} | {step.rung for step in fresh.waiting}
        for rung in sorted(rungs):
            ran = [r for view in found if view.scale == scale for r in view.records if r["rung"] == rung]
            rows.append([scale, rung, _expected(fresh, rung), *_measured(ran), _lost(ran), _total(ran)])
    columns = ("scale", "rung", "expected, minutes a cell", "measured, median of n finished cells", "on")
    return words.table([*columns, "lost cells, which end early", "all, minutes"], rows)


def _expected(fresh: Plan, rung: str) -> str:
    """Of one H200."""
    found = {round(cell.recipe.seconds / 60, 1) for cell in fresh.cells if cell.rung == rung}
    found |= {round(step.seconds / step.cells / 60, 1) for step in fresh.waiting if step.rung == rung and step.cells}
    return " to ".join(f"{minutes:,.1f}" for minutes in sorted({min(found), max(found)}))


def _measured(ran: Sequence[Record]) -> tuple[str, str]:
    done = [record for record in ran if not is_lost(record)]
    if not done:
        return "none finished" if ran else "not run", words.DASH
    devices = ", ".join(dict.fromkeys(str(record["device"]) for record in done))
    return f"{statistics.median(r['seconds'] for r in done) / 60:.2f} (n = {len(done)})", devices


def _lost(ran: Sequence[Record]) -> str:
    return f"{sum(map(is_lost, ran))} of {len(ran)}" if ran else words.DASH


def _total(ran: Sequence[Record]) -> str:
    return f"{sum(r['seconds'] for r in ran) / 60:.1f}" if ran else words.DASH

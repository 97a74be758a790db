"""What a cell of each rung costs: expected of its recipe, and measured where cells have run."""

import statistics
from collections.abc import Sequence

from revival import words
from revival.plan import plan
from revival.records import Record, is_lost
from revival.study import Results
from revival.view import View

STUDIES = ("short", "full")
PARTS = ("start", "first_steps", "training", "evaluation", "heads")  # of a record's `clock`


def costs(found: Sequence[View]) -> list[str]:
    """A row a rung and length; cells that choose rates cost the same, but for the heads' evaluation."""
    rows = []
    for scale in STUDIES:
        for (rung, tokens), seconds in sorted(_expected(scale).items()):
            records = [r for view in found if view.scale == scale for r in view.records]
            ran = [r for r in records if (r["rung"], r["planned_tokens"]) == (rung, tokens)]
            first = [scale, rung, words.millions(tokens), f"{seconds / 60:,.1f}"]
            rows.append([*first, *_measured(ran), _lost(ran), _total(ran)])
    columns = ("scale", "rung", "tokens a cell", "expected, minutes a cell", "measured, median of n finished cells")
    parts = f"of it, seconds: {', '.join(PARTS).replace('_', ' ')}"
    return words.table([*columns, parts, "on", "lost cells, which end early", "all, GPU minutes"], rows)


def _expected(scale: str) -> dict[tuple[str, int], float]:
    """(rung, tokens) -> seconds a cell alone on an H200."""
    fresh = plan(scale, Results([], None))
    found = {(step.rung, step.recipe.tokens): step.recipe.seconds for step in fresh.waiting}
    return found | {(cell.rung, cell.recipe.tokens): cell.recipe.seconds for cell in fresh.cells}


def _measured(ran: Sequence[Record]) -> tuple[str, str, str]:
    done = [record for record in ran if not is_lost(record)]
    if not done:
        return "none finished" if ran else "not run", words.DASH, words.DASH
    minutes = statistics.median(r["seconds"] for r in done) / 60
    parts = [statistics.median(r["clock"][name] for r in done) for name in PARTS]
    devices = ", ".join(dict.fromkeys(str(r["device"]) for r in done))
    least, most = min(r["workers"] for r in done), max(r["workers"] for r in done)
    together = "" if most == 1 else f", {most if least == most else f'{least} to {most}'} cells at a time"
    return f"{minutes:.2f} (n = {len(done)})", ", ".join(f"{part:.0f}" for part in parts), devices + together


def _lost(ran: Sequence[Record]) -> str:
    return f"{sum(map(is_lost, ran))} of {len(ran)}" if ran else words.DASH


def _total(ran: Sequence[Record]) -> str:
    return f"{gpu_seconds(ran) / 60:.1f}" if ran else words.DASH


def gpu_seconds(records: Sequence[Record]) -> float:
    """Cells that share a GPU have a part of it each; as many share it as were to, also while one is left alone."""
    return sum(float(r["seconds"]) / r["workers"] for r in records)

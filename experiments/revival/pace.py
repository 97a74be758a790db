"""How long cells take: as expected, or longer, by what was measured on this device."""

import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from revival.cells import Cell
from revival.records import Record

RECENT = 3  # runs by which an expected time is corrected: the first one of a call compiles
START = 10.0  # seconds until a process trains; the `seconds` of a record begin after it
Kind = tuple[object, ...]


def kind(cell: Cell) -> Kind:
    """Equal for cells that take about as long; those that choose rates are spared what heads are worth."""
    recipe = cell.recipe
    return recipe.groups, recipe.steps, recipe.tokens_a_step, recipe.seconds, cell.tuning


@dataclass
class Pace:
    """What cells took that were trained to their end; a lost run may have ended early, and says nothing."""

    known: dict[Kind, list[float]] = field(default_factory=dict)  # (rung, tokens, tuning) -> seconds, of earlier calls
    seen: dict[Kind, list[float]] = field(default_factory=dict)  # kind -> seconds taken over expected, of this call

    def predicted(self, cell: Cell) -> float:
        """Seconds. A kind of cell that this call has not seen yet is never taken to be faster than expected."""
        expected = cell.recipe.seconds
        if kind(cell) in self.seen:
            return expected * statistics.median(self.seen[kind(cell)][-RECENT:])
        others = [ratio for ratios in self.seen.values() for ratio in ratios]
        known = self.known.get((cell.rung, cell.recipe.tokens, cell.tuning), [])
        slower = [statistics.median(known[-RECENT:])] if known else []
        slower += [expected * statistics.median(others)] if others else []
        return max([expected, *slower])

    def learn(self, cell: Cell, record: Record, start: float) -> None:
        """Take in a cell of this call; `start`: its share of what its process took besides its cells."""
        if record["status"] == "finished":
            ratio = (float(record["seconds"]) + start) / cell.recipe.seconds
            self.seen.setdefault(kind(cell), []).append(ratio)

    def recall(self, records: Iterable[Record], device: str | None) -> None:
        """Take in the results of earlier calls, of those on a device of this name."""
        for record in records:
            if device is not None and record.get("device") == device and record["status"] == "finished":
                about = record["rung"], record["planned_tokens"], record["tuning"]
                self.known.setdefault(about, []).append(float(record["seconds"]) + START)


def device_name(gpus: Sequence[str]) -> str | None:
    """As records name the device; None where it cannot be told. Does not touch the GPU, which the cells are to have."""
    if not gpus:
        return platform.processor() or "cpu"
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    found = {name.strip() for name in names if name.strip()}
    return found.pop() if len(found) == 1 else None

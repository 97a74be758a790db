"""How long cells take: as expected, or longer, by what was measured on this device."""

import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from revival.cells import Cell
from revival.records import Record

RECENT = 3  # runs by which an expected time is corrected: the first one of a call compiles
Kind = tuple[object, ...]


def kind(cell: Cell) -> Kind:
    """Equal for cells that take about as long; those that choose rates are spared what heads are worth."""
    recipe = cell.recipe
    return recipe.groups, recipe.steps, recipe.tokens_a_step, recipe.seconds, cell.tuning


def is_whole(record: Record) -> bool:
    """Whether all steps were trained, as they are of most runs that are lost by their final loss."""
    return bool(record["last_step"] == record["steps"])


@dataclass
class Pace:
    """What cells took that were trained to their end; a run that was given up ended early, and says nothing."""

    workers: int = 1  # that share a GPU: its time is theirs in turns, and what is not the GPU's goes on beside it
    known: dict[Kind, list[float]] = field(default_factory=dict)  # (rung, tokens, tuning) -> seconds, of earlier calls
    seen: dict[Kind, list[float]] = field(default_factory=dict)  # kind -> seconds taken over expected, of this call

    @property
    def is_measured(self) -> bool:
        """Whether anything is known of this device."""
        return bool(self.known or self.seen)

    def expected(self, cell: Cell) -> float:
        """Seconds by the recipe, which holds for a cell alone on an H200; at most, where several share it."""
        recipe = cell.recipe
        return recipe.seconds + (self.workers - 1) * recipe.steps * recipe.step_seconds

    def predicted(self, cell: Cell) -> float:
        """Seconds. A kind of cell that this call has not seen yet is never taken to be faster than expected."""
        expected = self.expected(cell)
        if kind(cell) in self.seen:
            return expected * statistics.median(self.seen[kind(cell)][-RECENT:])
        others = [ratio for ratios in self.seen.values() for ratio in ratios]
        known = self.known.get((cell.rung, cell.recipe.tokens, cell.tuning), [])
        slower = [statistics.median(known[-RECENT:])] if known else []
        slower += [expected * statistics.median(others)] if others else []
        return max([expected, *slower])

    def learn(self, cell: Cell, record: Record, more: float = 0.0) -> None:
        """Take in a cell of this call; `more`: its share of the seconds that its process took besides its cells."""
        if is_whole(record):
            ratio = (float(record["seconds"]) + more) / self.expected(cell)
            self.seen.setdefault(kind(cell), []).append(ratio)

    def recall(self, records: Iterable[Record], device: str | None) -> None:
        """Take in the results of earlier calls, of those on a device of this name that as many cells shared."""
        for record in records:
            same = device is not None and (record.get("device"), record["workers"]) == (device, self.workers)
            if same and is_whole(record):
                about = record["rung"], record["planned_tokens"], record["tuning"]
                self.known.setdefault(about, []).append(float(record["seconds"]))


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

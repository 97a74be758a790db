"""The flight recorder: the last steps' numbers, kept on the device, read only when something has gone wrong."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Entry(NamedTuple):
    """What the host knows of a step in the ring."""

    step: int
    lr: float
    batch: int  # the batch's place in the order of the data
    level: str  # what was measured: one of `hooks.LEVELS`


class Ring:
    """`length` rows of `width` float64 numbers, the oldest overwritten; one small copy a step, no transfer."""

    def __init__(self, length: int, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(length, width, dtype=torch.float64, device=device)
        self.entries: list[Entry | None] = [None] * length

    def write(self, entry: Entry, row: Tensor) -> None:
        place = entry.step % len(self.entries)
        self.rows[place].copy_(row)
        self.entries[place] = entry

    def read(self, until: int) -> tuple[list[Entry], np.ndarray]:
        """The entries up to step `until`, oldest first, and their rows (entries, width). Waits for the device."""
        rows = self.rows.cpu().numpy()
        found = [(entry, i) for i, entry in enumerate(self.entries) if entry is not None and entry.step <= until]
        found.sort()
        return [entry for entry, _ in found], rows[[i for _, i in found]]

"""The results of experiments/relu_revival.py: one JSON line a cell in results/relu_revival/<scale>/<rung>.jsonl.

Imports no torch. A line is written whole or not at all; a result that is there is never trained again.
"""

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from normfree.errors import EXIT_DIRECTORY, UserError
from normfree.records import strict, write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results" / "relu_revival"
Record = dict[str, Any]


def path_of(out: Path, scale: str, rung: str) -> Path:
    return out / scale / f"{rung}.jsonl"


def append(path: Path, record: Record) -> None:
    """Add a result to its file, which is replaced in one piece; other processes may add theirs at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(plain(record), allow_nan=False)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        write_atomically(path, text + line + "\n")
    finally:
        os.close(folder)


def merge(source: Path, out: Path) -> dict[Path, int]:
    """Add to `out` the results of `source`, another folder of results, that it does not have: file -> how many."""
    added = {}
    for file in sorted(source.glob("*/*.jsonl")):
        scale, path = file.parent.name, path_of(out, file.parent.name, file.stem)
        there = {record["key"] for record in read(out, scale)}
        new = [r for r in read(source, scale) if r["rung"] == file.stem and r["key"] not in there]
        for record in new:
            append(path, record)
        added[path] = len(new)
    return added


def plain(value: Any) -> Any:
    """What JSON can hold: arrays become lists, numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(part) for part in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        return plain(value.item())
    return strict(value)


def read(out: Path, scale: str) -> list[Record]:
    """All results of a scale, in the order of rungs and of training. Raises `UserError` for a line that is none."""
    records = []
    for path in sorted((out / scale).glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                assert isinstance(record, dict)
                assert {"key", "rung", "arm", "lr", "seed", "status"} <= set(record)
            except (ValueError, AssertionError):
                raise UserError(f"{path}: line {number} is no result of a cell.", EXIT_DIRECTORY) from None
            records.append(record)
    return records


def numbers(values: Any) -> np.ndarray:
    """A list of a record as float64, with null as NaN."""
    return np.array(_floats(values), dtype=np.float64)


def _floats(values: Any) -> Any:
    if isinstance(values, list):
        return [_floats(value) for value in values]
    return math.nan if values is None else float(values)  # float reads "NaN" and "Infinity"


# -- selecting ---------------------------------------------------------------------------------------------------------


def is_lost(record: Record) -> bool:
    return record["status"] == "lost"


def why_lost(record: Record) -> str:
    """What happened, in one line; the trainer's advice after it is for whoever can still change the run."""
    return str(record["lost"]["why"]).splitlines()[0].partition(" What to try: ")[0]


def same_rate(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)

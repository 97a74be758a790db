"""The files of a run directory, as bytes: appended by the trainer, torn tails left out by readers. Imports no torch."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from normfree.config import Config, to_dict
from normfree.errors import EXIT_DIRECTORY, UserError

FORMAT_VERSION = 1
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers are written as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def number(value: Any) -> Any:
    """What `strict` wrote, as the number it was."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def write_atomically(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """What a file of `arrays/` holds: one record has `shape`, its axes are named, its values have a unit."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    unit: str
    version: int = FORMAT_VERSION

    @property
    def record(self) -> np.dtype:
        return np.dtype([("step", "<i8"), ("value", np.dtype(self.dtype).newbyteorder("<"), self.shape)])


class RunWriter:
    """Appends to a run directory. Every write is flushed to the operating system before it returns."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "arrays").mkdir(parents=True, exist_ok=True)
        self._metrics = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._arrays: dict[str, Any] = {}
        self._infos: dict[str, ArrayInfo] = {}

    def config(self, config: Config) -> None:
        write_atomically(self.directory / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))

    def status(self, **fields: Any) -> None:
        """Merge `fields` into run.json."""
        path = self.directory / "run.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        merged = {name: strict(value) for name, value in (old | fields).items()}
        write_atomically(path, json.dumps(merged, indent=2, allow_nan=False) + "\n")

    def event(self, event: dict[str, Any]) -> None:
        """Add to the list `events` of run.json."""
        old = json.loads((self.directory / "run.json").read_text(encoding="utf-8"))
        self.status(events=[*old.get("events", []), event])

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step} | {name: strict(value) for name, value in values.items()}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()

    def array(self, name: str, step: int, value: np.ndarray, axes: Sequence[str], unit: str) -> None:
        """Append one record. The first one of a name fixes its shape and dtype."""
        info = ArrayInfo(tuple(value.shape), value.dtype.str.lstrip("<>=|"), tuple(axes), unit)
        if name not in self._arrays:
            path = self.directory / "arrays" / f"{name}.json"
            if not path.exists():
                write_atomically(path, json.dumps(dataclasses.asdict(info)) + "\n")
            self._infos[name] = read_info(path)
            self._arrays[name] = open(path.with_suffix(".bin"), "ab")  # noqa: SIM115
        if info != self._infos[name]:
            raise UserError(
                f"the record of {name!r} in {self.directory} has {self._infos[name]}, and now would get {info}: "
                "a statistic changed since the run began. Start a new run.",
                EXIT_DIRECTORY,
            )
        record = np.zeros((), info.record)
        record["step"], record["value"] = step, value
        self._arrays[name].write(record.tobytes())
        self._arrays[name].flush()

    def close(self) -> None:
        for file in (self._metrics, *self._arrays.values()):
            file.close()


def truncate(directory: Path, step: int) -> None:
    """Drop every record of `step` and after, and torn ones: what a run resumed at that checkpoint writes again."""
    metrics = directory / "metrics.jsonl"
    if metrics.exists():
        rows = [row for row in read_lines(metrics) if row["step"] < step]
        write_atomically(metrics, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    for path in sorted((directory / "arrays").glob("*.bin")):
        records = read_records(path)
        kept = records[records["step"] < step]
        if not len(kept):  # as if it had never been recorded
            path.with_suffix(".json").unlink()
            path.unlink()
            continue
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        kept.tofile(temporary)
        temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows as written; a line that is not whole (a kill in mid-write) ends the record."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


def read_info(path: Path) -> ArrayInfo:
    """What the .json beside an array file says of it."""
    values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return ArrayInfo(**values | {"shape": tuple(values["shape"]), "axes": tuple(values["axes"])})


def read_records(path: Path) -> np.ndarray:
    """The whole records of an array file, (records,) with the fields `step` and `value`."""
    dtype = read_info(path).record
    return np.fromfile(path, dtype, count=path.stat().st_size // dtype.itemsize)

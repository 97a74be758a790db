"""The files of a run directory, as bytes: appended by the trainer, torn tails left out by readers. Imports no torch."""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from normfree.config import Config, to_dict
from normfree.errors import EXIT_DIRECTORY, UserError

FORMAT_VERSION = 1
MAX_STEP = 2**40  # a record of a later step is none: its bytes are something else
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
    """Write beside, then rename: a reader sees the old file or the new one, never half of one, nor a leftover."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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


class _Tail:
    """A file that whole records are appended to. `size`: the bytes of its whole records; what follows them is torn."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._handle: int | None = None
        self._torn = True  # what a killed process may have left

    def append(self, data: bytes) -> None:
        """Write all of `data`. After an OSError none of it counts: the next call cuts off what there is of it."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if self._torn and os.fstat(self._handle).st_size > self.size:
            os.ftruncate(self._handle, self.size)
        self._torn = True
        left = memoryview(data)
        while left:
            left = left[os.write(self._handle, left) :]
        self._torn = False
        self.size += len(data)

    def sync(self) -> None:
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def remove(self) -> None:
        """A file without one whole record is as if it had never been begun."""
        self.close()
        self.path.unlink(missing_ok=True)


class RunWriter:
    """Appends to a run directory. Every write has reached the operating system before it returns.

    With `keep_going`, a disk that is full or fails ends nothing: records that cannot be written are left out, whole,
    counted by file in `dropped` and in `run.json`, and said once; `run.json` is written as soon as it can be. Without,
    the OSError is raised.
    """

    def __init__(self, directory: Path, keep_going: bool = False) -> None:
        self.directory = directory
        self.keep_going = keep_going
        (directory / "arrays").mkdir(parents=True, exist_ok=True)
        for pattern in (".run.json.*", ".config.yaml.*", ".metrics.jsonl.*", "arrays/.*"):
            for leftover in directory.glob(pattern):  # of a process that was killed
                leftover.unlink()
        self._known = _read_status(directory / "run.json")  # what run.json held when it was last read
        self._unwritten: dict[str, Any] = {}  # fields that it has yet to take
        self.dropped: dict[str, int] = dict(self._known.get("dropped", {}))
        self._failing: dict[str, str] = {}  # file -> why its last write failed
        metrics = directory / "metrics.jsonl"
        self._metrics = _Tail(metrics, _whole_lines(metrics))
        self._arrays: dict[str, _Tail] = {}
        self._infos: dict[str, ArrayInfo] = {}

    @property
    def fields(self) -> dict[str, Any]:
        """What run.json holds, or will hold when it can be written."""
        try:
            self._known = _read_status(self.directory / "run.json")
        except UserError:  # it was readable when the writer began; what it held is written again
            self._unwritten = self._known | self._unwritten
        return self._known | self._unwritten

    def config(self, config: Config) -> None:
        """Raises OSError: a run whose settings cannot be kept does not begin."""
        write_atomically(self.directory / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))

    def status(self, **fields: Any) -> None:
        """Merge `fields` into run.json."""
        self._unwritten |= {name: strict(value) for name, value in fields.items()}
        self._write_status()

    def event(self, event: dict[str, Any]) -> None:
        """Add to the list `events` of run.json."""
        self.status(events=[*self.fields.get("events", []), event])

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step} | {name: strict(value) for name, value in values.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            self._metrics.append(line.encode())
        except OSError as error:
            self._drop("metrics.jsonl", error)
        else:
            self._failing.pop("metrics.jsonl", None)
        if self._unwritten:
            self._write_status()

    def array(self, name: str, step: int, value: np.ndarray, axes: Sequence[str], unit: str) -> None:
        """Append one record. The first one of a name fixes its shape and dtype."""
        info = ArrayInfo(tuple(value.shape), value.dtype.str.lstrip("<>=|"), tuple(axes), unit)
        file = f"arrays/{name}.bin"
        try:
            tail = self._array(name, info)
            record = np.zeros((), info.record)
            record["step"], record["value"] = step, value
            tail.append(record.tobytes())
        except OSError as error:
            self._drop(file, error)
            if name in self._arrays and not self._arrays[name].size:
                self._arrays.pop(name).remove()
        else:
            self._failing.pop(file, None)

    def _array(self, name: str, info: ArrayInfo) -> _Tail:
        """The file of `name`, begun where it is missing."""
        if name not in self._arrays:
            path = self.directory / "arrays" / f"{name}.bin"
            if not path.exists():
                write_atomically(path.with_suffix(".json"), json.dumps(dataclasses.asdict(info)) + "\n")
            self._infos[name] = read_info(path)
            whole = read_records(path).nbytes if path.exists() else 0
            self._arrays[name] = _Tail(path, whole)
        if info != self._infos[name]:
            raise UserError(
                f"the record of {name!r} in {self.directory} has {self._infos[name]}, and now would get {info}: "
                "a statistic changed since the run began. Start a new run.",
                EXIT_DIRECTORY,
            )
        return self._arrays[name]

    def rewind(self, step: int) -> None:
        """Drop what was recorded of `step` and after: those steps are done again."""
        self.close()
        truncate(self.directory, step)
        metrics = self.directory / "metrics.jsonl"
        self._metrics = _Tail(metrics, _whole_lines(metrics))
        self._arrays, self._infos = {}, {}

    def sync(self) -> None:
        """Have the device keep what was appended: before a checkpoint from which the record would go on."""
        for tail in (self._metrics, *self._arrays.values()):
            try:
                tail.sync()
            except OSError as error:
                self._fail(str(tail.path.relative_to(self.directory)), error)

    def losses(self) -> list[str]:
        """In words, what the disk did not take, for each file that lacks something."""
        found = [f"{name}: {count} records could not be written" for name, count in sorted(self.dropped.items())]
        if "run.json" in self._failing:
            found.append(f"run.json is not up to date: {self._failing['run.json']}")
        return found

    def close(self) -> None:
        if self._unwritten:
            self._write_status()
        for tail in (self._metrics, *self._arrays.values()):
            tail.close()

    def _write_status(self) -> None:
        try:
            text = json.dumps(self.fields, indent=2, allow_nan=False) + "\n"
            write_atomically(self.directory / "run.json", text)
        except OSError as error:
            self._fail("run.json", error)
        else:
            self._unwritten = {}
            self._failing.pop("run.json", None)

    def _drop(self, file: str, error: OSError) -> None:
        """Count a record of `file` that was not written; run.json says so with the next row or status."""
        self._fail(file, error)
        self.dropped[file] = self.dropped.get(file, 0) + 1
        self._unwritten["dropped"] = dict(self.dropped)

    def _fail(self, file: str, error: OSError) -> None:
        if not self.keep_going:
            raise error
        if file not in self._failing:
            where = self.directory / file
            warnings.warn(f"{where} cannot be written ({error.strerror}); training goes on without", stacklevel=4)
        self._failing[file] = str(error.strerror)


def _read_status(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(fields, dict):
            return fields
        reason = "it holds no object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read: {reason}. Move it away; it is written anew.", EXIT_DIRECTORY)


def truncate(directory: Path, step: int) -> None:
    """Drop every record of `step` and after, and torn ones: what a run resumed at that checkpoint writes again."""
    metrics = directory / "metrics.jsonl"
    if metrics.exists():
        data = metrics.read_bytes()
        kept = b"".join(line for line, row in _rows(data) if row["step"] < step)
        if data.startswith(kept):  # as always, unless a line in the middle went bad
            os.truncate(metrics, len(kept))  # needs no space on the disk, and no moment without the file
        else:
            write_atomically(metrics, kept.decode("utf-8"))
    for path in sorted((directory / "arrays").glob("*.bin")):
        records = read_records(path)
        kept_records = records[records["step"] < step]  # the first of them: steps only rise
        if len(kept_records):
            os.truncate(path, kept_records.nbytes)
        else:  # as if it had never been recorded
            path.unlink()
            path.with_suffix(".json").unlink()


def _rows(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, row) of every whole line that is a row; a torn last line and bytes that are none are left out."""
    for line in data.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MAX_STEP:
            yield line + b"\n", row


def _whole_lines(path: Path) -> int:
    """Bytes up to the last line that was ended."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows as written. A last line that is not whole (a kill in mid-write), or one gone bad, is left out."""
    return [row for _, row in _rows(path.read_bytes())]


def read_info(path: Path) -> ArrayInfo:
    """What the .json beside an array file says of it."""
    path = path.with_suffix(".json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return ArrayInfo(**values | {"shape": tuple(values["shape"]), "axes": tuple(values["axes"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read, and without it neither can its array: {error}", EXIT_DIRECTORY
        ) from error


def read_records(path: Path) -> np.ndarray:
    """The whole records of an array file, (records,) with the fields `step` and `value`.

    Steps only rise; what follows the first record that does not is no record (zeros that a power cut left, say).
    """
    dtype = read_info(path).record
    records = np.fromfile(path, dtype, count=path.stat().st_size // dtype.itemsize)
    steps = records["step"]
    rises = (steps > np.concatenate(([-1], steps[:-1]))) & (steps < MAX_STEP)
    return records if rises.all() else records[: int(rises.argmin())]

"""The directory of a run's checkpoints: written beside, read back, renamed; verified before they are used. No torch.

    checkpoints/step-00000100/   files and MANIFEST.json, which has the sha256 of each and of itself
    checkpoints/best.json        which of them had the lowest validation loss

A name that begins with a dot is what a killed process left. A checkpoint is found by its step and its digests, never by
a time stamp or a pointer alone. Only the holder of the run directory writes here.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.records import write_atomically
from normfree.runs import MANIFEST, checkpoint_name, is_checkpoint, load_run

FORMAT = 2  # of the manifest; 1 had no sha256 of itself
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml")
BEST = "best.json"


class NotSaved(Exception):
    """A checkpoint could not be written. The older ones are as they were, and nothing bears the new one's name."""


# -- writing ----------------------------------------------------------------------------------------------------------


def write(run_dir: Path, step: int, contents: Iterable[tuple[str, bytes]]) -> None:
    """Write `checkpoints/step-<step>` from (name, bytes) of each of `FILES`: whole, on the device, or not at all.

    It is read back and compared before it gets its name. An older one of that step gives way. Raises `NotSaved`.
    """
    target = run_dir / "checkpoints" / checkpoint_name(step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        sweep(run_dir)
        temporary.mkdir(parents=True)
        digests = {name: _write_file(temporary / name, data) for name, data in contents}
        _write_file(temporary / MANIFEST, manifest(step, digests))
        _fsync(temporary)
        verify(temporary)
        _put(temporary, target)
    except (OSError, UserError) as error:
        sweep(run_dir)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        free = shutil.disk_usage(run_dir).free / 1e6
        raise NotSaved(
            f"checkpoint {target} could not be written: {reason} ({free:,.1f} MB free). Older ones are as they were."
        ) from error


def _write_file(path: Path, data: bytes) -> str:
    """Returns the sha256 of what was meant, not of what is on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return hashlib.sha256(data).hexdigest()


def manifest(step: int, digests: dict[str, str]) -> bytes:
    """MANIFEST.json: the sha256 of each of `FILES`, and of what it says itself."""
    content = {"format": FORMAT, "step": step, "files": digests}
    return json.dumps(content | {"sha256": _own_digest(content)}, indent=2).encode() + b"\n"


def _own_digest(content: dict[str, Any]) -> str:
    """The sha256 of a manifest's content, its own entry `sha256` aside, however it is laid out."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _put(temporary: Path, target: Path) -> None:
    """Rename; what stands there (the run was resumed from before it) is put aside until the new one has its place."""
    if target.exists():
        target.rename(target.with_name(f".{target.name}.old"))
    temporary.rename(target)
    _fsync(target.parent)
    _fsync(target.parent.parent)
    sweep(target.parent.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(run_dir: Path) -> None:
    """Remove what killed writers left, and put back a checkpoint whose successor did not get its place."""
    for leftover in (run_dir / "checkpoints").glob(".*"):
        original = leftover.with_name(leftover.name.removeprefix(".").removesuffix(".old"))
        if leftover.suffix == ".old" and not original.exists():
            leftover.rename(original)
        elif leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best; and what killed writers left.

    The newest that is whole, and the newest that is whole and finite, are read and kept whatever their age. Where none
    is whole, nothing is deleted.
    """
    sweep(run_dir)
    checkpoints = load_run(run_dir).checkpoints
    old = checkpoints[: max(0, len(checkpoints) - keep)]
    if not old:
        return
    kept: list[Path] = []
    for _, path, finite in _whole(run_dir):
        if finite or not kept:
            kept.append(path)
        if finite:
            break
    best = _noted(run_dir)
    for step, path in old:
        if kept and path not in kept and (best is None or step != best["step"]):
            gone = path.with_name(f".{path.name}.gone")  # killed in the middle, it is a leftover and no checkpoint
            path.rename(gone)
            shutil.rmtree(gone)


# -- finding ----------------------------------------------------------------------------------------------------------


def verify(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json, after every file has been found to be what was written.

    Files that the manifest does not name are never opened. Raises `UserError`.
    """

    def damaged(what: str) -> UserError:
        return UserError(f"checkpoint {checkpoint} is damaged: {what}.", EXIT_CHECKPOINT)

    try:
        digests = _digests(json.loads((checkpoint / MANIFEST).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(f"{MANIFEST} cannot be read ({error})") from error
    for name in FILES:
        if not (checkpoint / name).is_file():
            raise damaged(f"{name} is missing")
        try:
            with open(checkpoint / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise damaged(f"{name} cannot be read ({error.strerror})") from error
        if found != digests[name]:
            raise damaged(f"{name} is not what was written")
    try:
        return _state(json.loads((checkpoint / "state.json").read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(f"state.json cannot be read ({error})") from error


def _state(told: Any) -> dict[str, Any]:
    """What state.json says; ValueError where that is no state. Digests that agree prove no good will."""
    if not isinstance(told, dict) or type(told.get("step")) is not int or type(told.get("finite")) is not bool:
        raise ValueError("it holds no step and whether it is finite")
    return told


def _digests(told: Any) -> dict[str, str]:
    """sha256 by file name; ValueError where the manifest is not what was written."""
    if not isinstance(told, dict):
        raise ValueError("it holds no object")
    if told.get("format") == 1 and set(told) == {"format", "step", "sha256"}:
        digests = told["sha256"]
    elif told.get("sha256") == _own_digest(told):
        digests = told.get("files") if told.get("format") == FORMAT else None
    else:
        raise ValueError("it is not what was written")
    if not isinstance(digests, dict) or set(digests) != set(FILES):
        raise ValueError(f"format {told.get('format')!r:.60}, or its list of files, is of another version")
    return digests


def _whole(run_dir: Path) -> Iterator[tuple[int, Path, bool]]:
    """(step, directory, whether finite) of each checkpoint that verifies and is of the step it is named after."""
    for step, path in reversed(load_run(run_dir).checkpoints):
        try:
            state = verify(path)
        except UserError:
            continue  # a damaged checkpoint is passed over here; naming it explicitly is an error
        if state["step"] == step:
            yield step, path, state["finite"]


def newest_good(run_dir: Path, finite: bool = True) -> tuple[int, Path] | None:
    """(step, directory) of the newest checkpoint that verifies and, if `finite`, holds no NaN or Inf."""
    return next(((step, path) for step, path, is_finite in _whole(run_dir) if is_finite or not finite), None)


# -- the best ---------------------------------------------------------------------------------------------------------


def identity(checkpoint: Path) -> dict[str, Any]:
    """Which checkpoint this is, by its contents: the run that `init_from` names may have gone on since."""
    return {"checkpoint": str(checkpoint), "manifest": _file_digest(checkpoint / MANIFEST)}


def note_best(run_dir: Path, step: int, loss: float) -> None:
    """Take in the validation loss at `step`: where it is the lowest so far, checkpoint `step` is the best, and is kept.

    Without a finite checkpoint of that step there is nothing to keep. Raises OSError.
    """
    path = run_dir / "checkpoints" / checkpoint_name(step)
    before = _noted(run_dir)
    if not math.isfinite(loss) or not is_checkpoint(path) or (before is not None and before["val/loss"] <= loss):
        return
    if json.loads((path / "state.json").read_bytes())["finite"]:
        told = {"step": step, "val/loss": loss, "manifest": _file_digest(path / MANIFEST)}
        write_atomically(path.with_name(BEST), json.dumps(told) + "\n")


def _noted(run_dir: Path) -> dict[str, Any] | None:
    """What best.json says, if the checkpoint that it means is still there."""
    path = run_dir / "checkpoints" / BEST
    try:
        told = json.loads(path.read_bytes())
        noted = path.parent / checkpoint_name(told["step"]) / MANIFEST
        same = isinstance(told["val/loss"], float) and told["manifest"] == _file_digest(noted)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if same else None


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def best_good(run_dir: Path) -> tuple[int, Path] | None:
    """(step, directory) of the verified checkpoint with the lowest validation loss; None where none was noted."""
    best = _noted(run_dir)
    if best is None:
        return None
    path = run_dir / "checkpoints" / checkpoint_name(best["step"])
    try:
        state = verify(path)
    except UserError:
        return None
    return (best["step"], path) if state["finite"] and state["step"] == best["step"] else None

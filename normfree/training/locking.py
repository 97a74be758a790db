"""One process per run directory: a lock that ends with its holder, and a refusal that says who the holder is."""

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from normfree.errors import EXIT_DIRECTORY, UserError

LOCK = "run.lock"


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir`, made where it is missing; raises UserError where another process has it or it cannot be written.

    The kernel frees the lock when the process ends, however it ends; the file stays, and means nothing by itself. On
    network file systems the lock is as good as their `flock`.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(run_dir, error) from error
    try:
        _take(handle, run_dir)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what is left there is read only while somebody holds the lock
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _take(handle: int, run_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"run_dir={run_dir} is in use by {_holder(handle)}.", EXIT_DIRECTORY) from error
    except OSError as error:
        raise _unusable(run_dir, error) from error
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    told = {"pid": os.getpid(), "host": platform.node(), "started": now}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(told).encode() + b"\n", 0)


def _holder(handle: int) -> str:
    """In words; the holder may not have written its name yet, or not have been able to."""
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        return f"process {told['pid']} on {told['host']}, since {told['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _unusable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"run_dir={run_dir} cannot be written: {error.strerror}.", EXIT_DIRECTORY)

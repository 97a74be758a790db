"""Processes that die, and disks that fill up, at a chosen operation. Real ones: fork, SIGKILL, RLIMIT_FSIZE, tmpfs."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # a first training step imports it; so need not each forked process

from normfree.runs import TIMES

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process. Returns its exit code: 0, 1 after an exception, -9 where it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Operations:
    """Counts what this process does to the files under `folder`; at number `last` it dies by SIGKILL, or does `then`.

    An operation is opening a file to write, half a write, fsync, mkdir, rename, remove, rmdir, truncate. Only for a
    forked process: what is put in place here stays.
    """

    def __init__(self, folder: Path, last: int | None = None, then: Callable[[], object] = die) -> None:
        self.folder, self.last, self.then, self.count = str(folder), last, then, 0
        sys.addaudithook(self._audit)
        self._write, self._fsync, self._halve = os.write, os.fsync, False
        os.write, os.fsync = self._half, self._synced  # type: ignore[assignment]

    def next(self) -> None:
        self.count += 1
        if self.count == self.last:
            self.then()

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changes = bool(args[2] & WRITES)
        else:
            changes = event in CHANGES
        # Removing a tree names files by a folder's handle and their own name.
        if changes and (str(args[0]).startswith(self.folder) or (event in CHANGES and "/" not in str(args[0]))):
            self.next()

    def _half(self, handle: int, data: Any) -> int:
        """Every other write is half of what was asked for."""
        self._halve = not self._halve
        done = self._write(handle, memoryview(data)[: max(1, len(data) // 2)] if self._halve else data)
        self.next()
        return done

    def _synced(self, handle: int) -> None:
        self._fsync(handle)
        self.next()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: part of a write is done, the next one is EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small_disk(folder: Path, size: str) -> bool:
    """Mount a memory disk of `size` on `folder`, for this (forked) process alone. False where that is not allowed."""
    new_user, new_mounts = 0x10000000, 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(new_mounts if user == 0 else new_user | new_mounts):
        return False
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC: the mount stays in here
    if libc.mount(b"none", b"/", None, private, None):
        return False
    return libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) == 0


def record(run_dir: Path) -> dict[str, object]:
    """Everything a run leaves behind but times, run.json, the lock and views: file -> contents."""
    found: dict[str, object] = {}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        elif path.is_file() and name not in ("run.json", "run.lock"):
            found[name] = path.read_bytes()
    return found


def same(run: Path, whole: Path) -> bool:
    """Whether two run directories hold the same; `config.yaml` names the directory, and is left out."""
    ours, theirs = record(run), record(whole)
    named = {name for name in theirs if name.endswith(("config.yaml", "MANIFEST.json", "best.json"))}
    return ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in theirs.keys() - named)

"""One run under faults, life after life, each a forked process; after each, what must hold is looked at."""

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crashes import Operations, in_child, record

from normfree.cli import run_config
from normfree.config import Config
from normfree.errors import EXIT_DIRECTORY, EXIT_DISK, UserError
from normfree.records import read_lines
from normfree.runs import TIMES, checkpoint_name, load_run
from normfree.training import checkpoint as ckpt
from normfree.training import session
from normfree.training.store import FILES, MANIFEST

TENSORS = ("model.safetensors", "optimizer.safetensors")
ENDINGS = {0, 1, EXIT_DISK, EXIT_DIRECTORY, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1} | {
    128 + signum for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
}


class Trial:
    """A run in `folder`, beside the `whole` one that nothing disturbed and that kept a checkpoint of every step.

    `build(run_dir)` gives the settings, those of `whole` but for `train.checkpoint_every` and `keep_checkpoints`.
    """

    def __init__(self, build: Callable[[str], Config], folder: Path, whole: Path, rolls_back: bool = False) -> None:
        self.build, self.folder, self.whole, self.rolls_back = build, folder, whole, rolls_back
        self.rows = {line_key(row): row for row in rows_of(whole)}
        self.lives, self.done = 0, False

    # -- a life -------------------------------------------------------------------------------------------------------

    def live(self, before: Callable[[], object] = lambda: None) -> int:
        """Begin the run or go on with it, in a process in which `before` was called; how that ended.

        0: the run is finished. Asserts that nothing was lost and nothing is wrong.
        """
        good, started = self.good(), self.status().get("started_from_step")

        def work() -> None:
            session._sample = session.closing_table = lambda *args: ""  # type: ignore[assignment]
            try:
                before()
                os._exit(run_config(self.build(str(self.folder))).exit_code)
            except UserError as error:
                os._exit(error.exit_code)
            except KeyboardInterrupt:
                os._exit(1)
            except BaseException:
                traceback.print_exc()
                os._exit(99)

        code = in_child(work)
        self.lives += 1
        self.done = self.status().get("status") == "finished"  # also where it was killed after that
        assert code in ENDINGS, code
        if (self.folder / "config.yaml").exists():
            assert self.status().get("started_from_step") in (started, good or 0), "it began where the last one got to"
            assert (self.good() or 0) >= (good or 0), "no step that was saved is lost"
            self.look()
        return code

    def kill(self, last: int) -> int:
        return self.live(lambda: Operations(self.folder, last))

    def ask_to_stop(self, last: int, signum: int) -> int:
        """A signal at operation `last`, in the middle of whatever that is."""
        return self.live(lambda: Operations(self.folder, last, lambda: os.kill(os.getpid(), signum)))

    def fill_disk(self, last: int, size: int, window: int) -> int:
        """From operation `last` on, for `window` operations, no file can grow beyond `size` bytes."""

        def before() -> None:
            operations = Operations(self.folder, last)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

            def again() -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

            def full() -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                operations.last, operations.then = last + window, again

            operations.then = full

        return self.live(before)

    # -- between lives ------------------------------------------------------------------------------------------------

    def good_steps(self) -> list[int]:
        """Steps of the checkpoints that verify."""
        return [] if not (self.folder / "config.yaml").exists() else sorted(s for s, _, _ in ckpt_whole(self.folder))

    def good(self) -> int | None:
        return max(self.good_steps(), default=None)

    def damage_newest(self, file: int, place: float, bit: int | None) -> bool:
        """Flip a bit of the newest checkpoint, or cut a file short (`bit` None); not of the last good one."""
        steps = self.good_steps()
        if len(steps) < 2:
            return False
        path = self.folder / "checkpoints" / checkpoint_name(steps[-1]) / [*FILES, MANIFEST][file % (len(FILES) + 1)]
        data = bytearray(path.read_bytes())
        at = int(place * len(data))
        if bit is None:
            del data[at:]
        else:
            data[at] ^= 1 << bit
        path.write_bytes(data)
        return True

    def tear(self, junk: bytes) -> None:
        """What a power cut may leave behind the records."""
        for path in [self.folder / "metrics.jsonl", *(self.folder / "arrays").glob("*.bin")]:
            if path.exists():
                with open(path, "ab") as file:
                    file.write(b"\xff" + junk)

    def prune(self, keep: int) -> None:
        if (self.folder / "config.yaml").exists():
            good = self.good()
            ckpt.prune(self.folder, keep)
            assert self.good() == good

    # -- what must hold -----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def look(self) -> None:
        """Nothing that is there is wrong: every checkpoint that verifies, every row, is the undisturbed run's."""
        for step in self.good_steps():
            for name in TENSORS:
                ours, theirs = (run / "checkpoints" / checkpoint_name(step) / name for run in (self.folder, self.whole))
                assert ours.read_bytes() == theirs.read_bytes(), f"{ours} is not what the undisturbed run has"
        for row in [] if self.rolls_back else rows_of(self.folder):  # those before it rolls back are written anew
            assert self.rows[line_key(row)] == row

    def finish(self) -> None:
        """Live on, undisturbed, to the end; what is there then is what the undisturbed run has."""
        for _ in range(2):  # where the last checkpoint was not written, once more
            if not self.done:
                self.live()
        run = load_run(self.folder)
        assert run.status["status"] == "finished"
        ours, theirs = record(self.folder), record(self.whole)
        lost = run.status.get("dropped", {})
        for name, value in theirs.items():
            if name == "metrics.jsonl":
                kept = [row for row in value if row in ours[name]]  # type: ignore[attr-defined, operator]
                assert ours[name] == kept
                assert len(value) - len(kept) <= lost.get(name, 0)  # type: ignore[arg-type]
            elif name.endswith(".bin") and name not in lost:
                assert ours[name] == value, name
        assert self.good() == run.config.train.max_steps


def ckpt_whole(run_dir: Path) -> list[tuple[int, Path, bool]]:
    """(step, directory, whether finite) of each checkpoint of the run that verifies."""
    found = []
    for step, path in load_run(run_dir).checkpoints:
        try:
            state = ckpt.verify(path)
        except UserError:
            continue
        found.append((step, path, state["finite"]))
    return found


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows as written, without times."""
    path = run_dir / "metrics.jsonl"
    rows = read_lines(path) if path.exists() else []
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def line_key(row: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    return row["step"], tuple(sorted(row))

"""Runs the cells of experiments/relu_revival.py: one worker a GPU, a process a cell, within a budget of minutes."""

import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from revival import process
from revival import records as store
from revival.cells import Cell
from revival.pace import Pace, device_name
from revival.place import Place
from revival.plan import Plan, check_patterns, plan
from revival.records import Record
from revival.study import Results

TAIL = 25  # lines of a failed process that are shown
GIVE_UP = 3  # times each worker's process fails while no cell is kept: it is not the cells
# A process is ended after so many times its predicted seconds, and so many seconds at least; the second pair holds
# until a cell has been timed on this device, which may be slower than the one that times were expected of.
HANGS, UNTRIED = (5, 600.0), (30, 3600.0)
OVERTIME = 120.0  # seconds beyond the budget: then it is ended too


@dataclass
class Options:
    """How to run: see relu_revival.py's own options."""

    scale: str
    place: Place
    out: Path
    runs: Path
    keep: bool
    seeds: tuple[int, ...]
    patterns: tuple[str, ...] = ()
    commit: str | None = None  # of this code, where there is no git to ask
    known: tuple[Path, ...] = ()  # further results, which count as done
    seconds: float = float("inf")
    gpus: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of each worker; none: one worker on the CPU
    together: int = 1  # cells a process trains one after another
    began: float = field(default_factory=time.monotonic)  # the command; the budget counts from here

    @property
    def workers(self) -> int:
        """How many share a GPU, at most."""
        return max(map(self.gpus.count, self.gpus), default=1)


@dataclass
class Session:
    """The cells of one call: what is next, what is under way, what went wrong. One object for all workers."""

    options: Options
    running: dict[str, Cell] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    done: int = 0
    in_a_row: int = 0  # processes that failed since a cell was kept
    pace: Pace = field(init=False)
    changed: threading.Condition = field(default_factory=threading.Condition)
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: bool = False
    error: BaseException | None = None  # of a worker: not of a cell, which fails by itself

    def __post_init__(self) -> None:
        self.pace = Pace(self.options.workers)
        if self.options.seconds < float("inf"):
            self.pace.recall(self.records(), device_name(self.options.gpus))

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.options.began)

    def records(self) -> list[Record]:
        folders = [*self.options.known, self.options.out]
        return [record for folder in folders for record in store.read(folder, self.options.scale)]

    def results(self) -> Results:
        place = self.options.place
        return Results(self.records(), place.fingerprint, self.options.seeds, place.by_length)

    def ready(self) -> list[Cell]:
        """The next cells that fit into the budget, in order of value."""
        results = self.results()
        found: list[Cell] = []
        used = 0.0
        planned = plan(self.options.scale, results, self.options.patterns)
        last = self.last_rung(planned)
        for cell in planned.cells:
            if cell.name in self.running or cell.name in self.failed or (last is not None and cell.rung > last):
                continue
            seconds = self.pace.predicted(cell)
            if used + seconds <= self.left():
                found.append(cell)
                used += seconds
            if len(found) == self.options.together:
                break
        return found

    def last_rung(self, planned: Plan) -> str | None:
        """The first rung that waits for rates which cells under way may settle: its cells are worth more than later
        ones, so those are not begun. None: no rung does. Rungs sort as they are worth: A, A2, B.
        """
        settling = {cell.rung for cell in self.running.values() if cell.tuning}
        return min((step.rung for step in planned.waiting if step.rung in settling), default=None)

    def take(self) -> list[Cell]:
        """Cells for a worker; waits while others may yet make some possible. Empty: there is nothing more to do."""
        with self.changed:
            while not self.stopping and not self.hopeless:
                cells = self.ready()
                if cells or not self.running:
                    self.running |= {cell.name: cell for cell in cells}
                    return cells
                self.changed.wait()
            return []

    @property
    def hopeless(self) -> bool:
        """Whether to begin no more: where every cell fails, the rest of the budget would go the same way."""
        return self.in_a_row >= GIVE_UP * max(1, len(self.options.gpus))

    def finish(self, cells: Sequence[Cell], seconds: float) -> None:
        """A process has ended: what it kept is done, the first of the rest failed and is not tried again by this call.

        It trains cells in turn, so those after the first that it did not keep were never begun.
        """
        results = self.results()
        kept = {cell.name: record for cell in cells if (record := results.of(cell)) is not None}
        rest = [cell for cell in cells if cell.name not in kept]
        with self.changed:
            for cell in cells:
                del self.running[cell.name]
            self.done += len(kept)
            self.in_a_row = 0 if kept else self.in_a_row + 1
            self.failed |= {cell.name for cell in rest[:1]}
            more = (seconds - sum(float(record["seconds"]) for record in kept.values())) / len(cells)
            for cell in cells if not rest else ():
                self.pace.learn(cell, kept[cell.name], max(0.0, more))
            self.changed.notify_all()

    # -- a process ----------------------------------------------------------------------------------------------------

    def work(self, gpu: str | None) -> None:
        """A worker: takes cells until there are none."""
        try:
            while cells := self.take():
                began = time.monotonic()
                self.train(cells, gpu)
                self.finish(cells, time.monotonic() - began)
        except Exception as error:
            self.error = error
            self.stop()

    def train(self, cells: Sequence[Cell], gpu: str | None) -> None:
        """Train cells in one process."""
        options = self.options
        names = ", ".join(cell.name for cell in cells)
        say(f"{names}: {sum(map(self.pace.predicted, cells)):.0f} s expected" + (f", GPU {gpu}" if gpu else ""))
        folder = Path(tempfile.mkdtemp(dir=options.runs, prefix="cell-"))
        began, limit = time.monotonic(), self.limit(cells)
        tasks = {"out": str(options.out.resolve()), "scale": options.scale, "keep": options.keep}
        tasks |= {"runs": str(folder if not options.keep else options.runs), "commit": options.commit}
        tasks |= {"began": began, "workers": max(1, options.gpus.count(gpu or ""))}
        tasks["cells"] = [process.task_of(cell, options.place) for cell in cells]
        with (folder / "log.txt").open("w") as log:
            child = process.begin(tasks, folder, gpu, log)
            self.processes.add(child)
            if self.stopping:  # since these cells were taken
                process.end([child])
            try:
                code, how = child.wait(None if limit == float("inf") else limit), "failed"
            except subprocess.TimeoutExpired:
                process.end([child])
                code, how = child.returncode, f"ended, as it may take {limit:.0f} s at most: failed"
            self.processes.discard(child)
        seconds = time.monotonic() - began
        if code != 0 and not self.stopping:
            text = (folder / "log.txt").read_text(errors="replace").splitlines()[-TAIL:]
            say("\n".join([f"{names}: {how} with exit code {code} after {seconds:.0f} s", *text]))
        self.tell(cells, seconds)
        shutil.rmtree(folder, ignore_errors=True)  # a child that cannot be killed may still write

    def limit(self, cells: Sequence[Cell]) -> float:
        """Seconds after which a process that trains these cells is taken to hang."""
        times, least = HANGS if self.pace.is_measured else UNTRIED
        own = max(least, times * sum(map(self.pace.predicted, cells)))
        if not (self.pace.is_measured or self.options.gpus or self.options.scale == "smoke"):
            own = float("inf")  # what is expected of a GPU says nothing of a CPU
        return min(own, self.left() + OVERTIME)

    def tell(self, cells: Sequence[Cell], seconds: float) -> None:
        results = self.results()
        for cell in cells:
            record = results.of(cell)
            if record is not None:
                loss = record.get("val_loss")
                shown = f"lost ({store.why_lost(record)})" if record["lost"] else f"val loss {loss:.4f}"
                say(f"{record['name']}: {shown}, {record['seconds']:.0f} s")
        say(f"{len(cells)} cells took {seconds:.0f} s" if len(cells) > 1 else f"its process took {seconds:.0f} s")

    def stop(self) -> None:
        """End what is under way; cells that were not done are trained again by the next call."""
        self.stopping = True
        process.end(self.processes.copy())
        with self.changed:
            self.changed.notify_all()


def say(text: str) -> None:
    print(text, flush=True)


def _terminated(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # timeout(1) sends two
    raise SystemExit


def run(options: Options) -> int:
    """Train what can be trained; 0 where nothing failed. Ctrl-C and SIGTERM lose only the cells under way.

    Raises `UserError` where a pattern names no cell.
    """
    session = Session(options)
    check_patterns(options.scale, session.results(), options.patterns)
    workers = [threading.Thread(target=session.work, args=(gpu,), daemon=True) for gpu in options.gpus or (None,)]
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
    except (KeyboardInterrupt, SystemExit) as stop:
        session.stop()
        for worker in workers:
            worker.join()
        say(f"interrupted; {session.done} cells are done and kept")
        return 130 if isinstance(stop, KeyboardInterrupt) else 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    if session.error is not None:
        raise session.error
    if session.hopeless:
        say(f"given up: the last {session.in_a_row} processes failed")
    minutes = (time.monotonic() - options.began) / 60
    if not (session.done or session.failed):
        say_why(plan(options.scale, session.results(), options.patterns))
    say(f"{session.done} cells in {minutes:.1f} minutes; {len(session.failed)} failed; results: {options.out}")
    return 1 if session.failed else 0


def say_why(found: Plan) -> None:
    """Why no cell was begun."""
    if found.cells:
        say(f"no cell fits into the budget; the next is {found.cells[0].name}")
    else:
        say("\n".join([f"{len(found.done)} cells are done, none can be begun", *(f"later: {w}" for w in found.later)]))

"""Runs the cells of experiments/relu_revival.py: one worker a GPU, a process a cell, within a budget of minutes."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revival import records as store
from revival.cells import Cell, key
from revival.place import Place
from revival.plan import plan
from revival.study import Results

EXPERIMENTS = Path(__file__).parents[1]
CHILD = (sys.executable, "-m", "revival.cell")
RECENT = 3  # processes by which expected times are corrected: the first one compiles
TAIL = 25  # lines of a failed process that are shown
GRACE = 20  # seconds that a stopped process has to end by itself
# Compiled code is kept between the processes of this machine; set the variables to keep it elsewhere.
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "relu_revival-inductor", "TRITON_CACHE_DIR": "relu_revival-triton"}


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


@dataclass
class Session:
    """The cells of one call: what is next, what is under way, what went wrong. One object for all workers."""

    options: Options
    began: float = field(default_factory=time.monotonic)
    running: dict[str, Cell] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    done: int = 0
    ratios: list[float] = field(default_factory=list)  # seconds taken over seconds expected
    changed: threading.Condition = field(default_factory=threading.Condition)
    processes: set[Any] = field(default_factory=set)
    stopping: bool = False
    error: BaseException | None = None  # of a worker: not of a cell, which fails by itself

    def predicted(self, cell: Cell) -> float:
        """Seconds: as expected, corrected by the cells of this call."""
        return cell.recipe.seconds * (statistics.median(self.ratios[-RECENT:]) if self.ratios else 1.0)

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.began)

    def results(self) -> Results:
        folders = [*self.options.known, self.options.out]
        records = [record for folder in folders for record in store.read(folder, self.options.scale)]
        return Results(records, self.options.place.fingerprint, self.options.seeds)

    def ready(self) -> list[Cell]:
        """The next cells that fit into the budget, in order of value."""
        results = self.results()
        found: list[Cell] = []
        used = 0.0
        for cell in plan(self.options.scale, results, self.options.patterns).cells:
            if cell.name in self.running or cell.name in self.failed:
                continue
            if used + self.predicted(cell) <= self.left():
                found.append(cell)
                used += self.predicted(cell)
            if len(found) == self.options.together:
                break
        return found

    def take(self) -> list[Cell]:
        """Cells for a worker; waits while others may yet make some possible. Empty: there is nothing more to do."""
        with self.changed:
            while not self.stopping:
                cells = self.ready()
                if cells or not self.running:
                    self.running |= {cell.name: cell for cell in cells}
                    return cells
                self.changed.wait()
            return []

    def finish(self, cells: Sequence[Cell], seconds: float) -> None:
        """A process has ended: what it kept is done, the rest is not tried again by this call."""
        results = self.results()
        kept = [cell for cell in cells if results.of(cell) is not None]
        with self.changed:
            for cell in cells:
                del self.running[cell.name]
            self.done += len(kept)
            self.failed |= {cell.name for cell in cells} - {cell.name for cell in kept}
            if len(kept) == len(cells):
                self.ratios.append(seconds / sum(cell.recipe.seconds for cell in cells))
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
        say(f"{names}: {sum(map(self.predicted, cells)):.0f} s expected" + (f", GPU {gpu}" if gpu else ""))
        folder = Path(tempfile.mkdtemp(dir=options.runs, prefix="cell-"))
        tasks = {"out": str(options.out.resolve()), "scale": options.scale, "keep": options.keep}
        tasks |= {"runs": str(folder if not options.keep else options.runs), "commit": options.commit}
        tasks["cells"] = [task_of(cell, options.place) for cell in cells]
        (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
        began = time.monotonic()
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [*CHILD, str(folder / "tasks.json")],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(gpu),
                cwd=EXPERIMENTS.parent,
            )
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        seconds = time.monotonic() - began
        if code and not self.stopping:
            text = (folder / "log.txt").read_text(errors="replace").splitlines()[-TAIL:]
            say("\n".join([f"{names}: failed with exit code {code} after {seconds:.0f} s", *text]))
        self.tell(cells, seconds)
        shutil.rmtree(folder)

    def tell(self, cells: Sequence[Cell], seconds: float) -> None:
        results = self.results()
        for cell in cells:
            record = results.of(cell)
            if record is not None:
                loss = record.get("val_loss")
                shown = f"lost ({record['lost']['why'].splitlines()[0]})" if record["lost"] else f"val loss {loss:.4f}"
                say(f"{record['name']}: {shown}, {record['seconds']:.0f} s")
        say(f"{len(cells)} cells took {seconds:.0f} s" if len(cells) > 1 else f"its process took {seconds:.0f} s")

    def stop(self) -> None:
        """End what is under way; cells that were not done are trained again by the next call."""
        self.stopping = True
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in list(self.processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        with self.changed:
            self.changed.notify_all()


def say(text: str) -> None:
    print(text, flush=True)


def task_of(cell: Cell, place: Place) -> dict[str, Any]:
    """What the process is told of a cell."""
    recipe = cell.recipe
    settings = cell.settings
    return {
        "key": key(settings, cell.seed, place.fingerprint),
        "name": cell.name,
        "rung": cell.rung,
        "arm": cell.arm.name,
        "lr": cell.lr,
        "seed": cell.seed,
        "tuning": cell.tuning,
        "settings": settings,
        "words": list(cell.words),
        "place": list(place.words),
        "tuning_tokens": recipe.tuning_tokens,
        "report_tokens": recipe.report_tokens,
        "head_sequences": recipe.head_sequences,
    }


def environment(gpu: str | None) -> dict[str, str]:
    """Of a process: where it finds the study, its GPU, and where compiled code is kept."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXPERIMENTS), found.get("PYTHONPATH")]))
    if gpu is not None:
        found["CUDA_VISIBLE_DEVICES"] = gpu
    for name, folder in CACHES.items():
        found.setdefault(name, str(Path(tempfile.gettempdir(), folder)))
    return found


def visible_gpus() -> tuple[str, ...]:
    """One CUDA_VISIBLE_DEVICES for each GPU that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part for part in named.split(",") if part)
    import torch

    return tuple(str(i) for i in range(torch.cuda.device_count()))


def run(options: Options) -> int:
    """Train what can be trained; 0 where nothing failed. Ctrl-C loses only the cells under way."""
    session = Session(options)
    workers = [threading.Thread(target=session.work, args=(gpu,), daemon=True) for gpu in options.gpus or (None,)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
    except KeyboardInterrupt:
        session.stop()
        for worker in workers:
            worker.join()
        say(f"interrupted; {session.done} cells are done and kept")
        return 130
    if session.error is not None:
        raise session.error
    minutes = (time.monotonic() - session.began) / 60
    say(f"{session.done} cells in {minutes:.1f} minutes; {len(session.failed)} failed")
    return 1 if session.failed else 0

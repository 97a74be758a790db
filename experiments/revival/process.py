"""The process that trains cells: what it is told, where it runs, and how it is ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from revival.cells import Cell
from revival.place import Place

EXPERIMENTS = Path(__file__).parents[1]
CHILD = (sys.executable, "-m", "revival.cell")
GRACE = 20  # seconds that a stopped process has to end by itself
# Compiled code is kept between the processes of this machine; set the variables to keep it elsewhere.
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "relu_revival-inductor", "TRITON_CACHE_DIR": "relu_revival-triton"}


def begin(tasks: dict[str, Any], folder: Path, gpu: str | None, log: TextIO) -> subprocess.Popen[bytes]:
    """Start a process for `tasks` (see cell.py), which it reads in `folder`."""
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return subprocess.Popen(
        [*CHILD, str(path)], stdout=log, stderr=subprocess.STDOUT, env=environment(gpu), cwd=EXPERIMENTS.parent
    )


def end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask them to end, and end those that do not."""
    processes = list(processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps its process
                process.wait(GRACE)


def task_of(cell: Cell, place: Place) -> dict[str, Any]:
    """What the process is told of a cell."""
    recipe = cell.recipe
    return {
        "key": cell.key(place.fingerprint, place.by_length),
        "name": cell.name,
        "rung": cell.rung,
        "arm": cell.arm.name,
        "lr": cell.lr,
        "seed": cell.seed,
        "tuning": cell.tuning,
        "settings": cell.settings,
        "words": list(cell.words),
        "place": list(place.words_of(cell)),
        "tuning_tokens": recipe.tuning_tokens,
        "report_tokens": recipe.report_tokens,
        "head_sequences": recipe.head_sequences,
    }


def environment(gpu: str | None) -> dict[str, str]:
    """Of a process: where it finds the study, its GPU (None: it sees none), and where compiled code is kept."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXPERIMENTS), found.get("PYTHONPATH")]))
    found["CUDA_VISIBLE_DEVICES"] = gpu or ""
    for name, folder in CACHES.items():
        found.setdefault(name, str(Path(tempfile.gettempdir(), folder)))
    return found

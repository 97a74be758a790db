"""Sweeps: a job that ends badly leaves the others alone; the same sweep again does what is left, wherever it died."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crashes import Operations, in_child, record

from normfree import cli
from normfree.errors import EXIT_DIVERGED
from normfree.runs import load_run
from normfree.training import session
from normfree.training.loop import Trainer

ROOT = Path(cli.__file__).parent.parent
PLUGIN = Path(__file__).parent / "bad_jobs.py"
STEPS, EVERY = 8, 2  # of a job; between checkpoints
WORDS = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "model.dropout.resid=0.1",
    f"train.max_steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.batch_size=4", "train.micro_batch_size=2",
    "train.eval_tokens=64", "diagnostics.every=2", "diagnostics.probe_sequences=1", "log.every=1", "log.figures=false",
    "log.tensorboard=false", "data=files", "data.tokenizer=bytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, text_folder, cache_dir) -> Callable[..., int]:
    """`sweep(folder, "model.act=relu,silu")`: a sweep in `folder`, by a forked process; its exit code.

    `before()` runs first in that process.
    """

    def go(folder: Path, *words: str, before: Callable[[], object] = lambda: None) -> int:
        folder.mkdir(exist_ok=True)

        def work() -> None:
            os.chdir(folder)
            os.environ |= {"XDG_CACHE_HOME": str(cache_dir), "BAD_JOBS": str(folder)}
            sys.argv = ["run.py"]
            session._sample = lambda trainer: ""  # type: ignore[assignment]  # it takes half the time of a job
            before()
            code = cli.main(["--plugin", str(PLUGIN), "-m", *WORDS, f"data.path={text_folder}", *words])
            sys.stderr.flush()
            os._exit(code)

        return in_child(work)

    return go


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory) -> Path:
    """Two jobs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    assert sweep(folder, "model.act=relu,silu") == 0
    return folder


def jobs(folder: Path) -> list[str]:
    """How each job of the last sweep in `folder` ended."""
    last = max((folder / "runs" / ".sweeps").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found = {int(path.stem.removeprefix("job-")): json.loads(path.read_text()) for path in last.glob("job-*.json")}
    return [found[number]["status"] for number in sorted(found)]


def run_of(folder: Path, act: str) -> Path:
    (path,) = (folder / "runs").glob(f"*-{act}-*")
    return path


def runs(folder: Path, *acts: str) -> list[dict[str, object]]:
    """What the runs with these activations left, times aside."""
    return [record(run_of(folder, act)) for act in acts]


def test_jobs_that_diverge_and_crash_leave_the_others(sweep, whole, tmp_path, capfd):
    assert sweep(tmp_path / "mixed", "model.act=relu,diverging,raising,silu") == EXIT_DIVERGED
    assert jobs(tmp_path / "mixed") == ["finished", "diverged", "crashed", "finished"]
    assert runs(tmp_path / "mixed", "relu", "silu") == runs(whole, "relu", "silu"), "bit for bit"
    assert told(capfd) == [("0", "finished"), ("1", "diverged"), ("2", "crashed"), ("3", "finished")]


def told(capfd) -> list[tuple[str, str]]:
    """(job, status) of the sweep's table."""
    table = capfd.readouterr().err.rpartition("sweep")[2]
    rows = [line.split("│")[1:3] for line in table.splitlines() if line.startswith("│")]
    return [(job.strip(), status.strip()) for job, status in rows if job.strip()]


def test_a_job_that_exits_and_a_full_disk_leave_the_others(sweep, whole, tmp_path, capfd):
    """A library that calls sys.exit; and a record of how the jobs ended that cannot be kept."""

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert sweep(tmp_path / "s", "model.act=exiting,relu") == 1
    assert jobs(tmp_path / "s") == ["crashed", "finished"]
    assert runs(tmp_path / "s", "relu") == runs(whole, "relu")
    assert sweep(tmp_path / "s", "model.act=relu,silu", before=lambda: setattr(cli, "write_atomically", refuse)) == 0
    assert runs(tmp_path / "s", "silu") == runs(whole, "silu")
    assert "No space left on device" in capfd.readouterr().err


def test_a_job_that_gets_a_signal_is_gone_on_with(sweep, whole, tmp_path, capfd):
    """A sequential sweep is one process: the signal is meant for all of it. The same sweep again does the rest."""
    assert sweep(tmp_path / "s", "model.act=stopped,relu") == 128 + signal.SIGTERM
    assert told(capfd) == [("0", "preempted"), ("1", "not begun")]
    assert 0 < load_run(run_of(tmp_path / "s", "stopped")).status["last_step"] < STEPS
    assert sweep(tmp_path / "s", "model.act=stopped,relu") == 0
    assert jobs(tmp_path / "s") == ["finished"] * 2
    assert load_run(run_of(tmp_path / "s", "stopped")).status["started_from_step"] > 0
    assert runs(tmp_path / "s", "relu") == runs(whole, "relu")
    (ours,), (theirs,) = runs(tmp_path / "s", "stopped"), runs(whole, "silu")  # the same function
    assert all(ours[name] == theirs[name] for name in ours if name.endswith((".bin", ".jsonl", ".safetensors")))


# -- killed -----------------------------------------------------------------------------------------------------------


def counting(path: Path) -> None:
    """Have every training step of this (forked) process leave one byte in `path`."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original = Trainer.train_step

    def counted(self, step, due):
        os.write(handle, b".")
        original(self, step, due)

    Trainer.train_step = counted  # type: ignore[method-assign]


def killed_until_done(sweep, folder: Path, seed: int, *words: str) -> tuple[int, int]:
    """(deaths, training steps) of a sweep that is killed by SIGKILL and started again until it ends well."""
    draw, steps = random.Random(seed), folder.with_name("steps")
    for deaths in range(40):
        last = draw.randint(150, 400 + 100 * deaths)
        code = sweep(folder, *words, before=lambda last=last: (counting(steps), Operations(folder, last)))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return deaths, steps.stat().st_size
    raise AssertionError("it never came to its end")


def test_a_killed_sweep_goes_on_and_does_nothing_twice(sweep, whole, tmp_path):
    deaths, steps = killed_until_done(sweep, tmp_path / "killed", 3, "model.act=relu,silu")
    assert deaths >= 3
    assert jobs(tmp_path / "killed") == ["finished"] * 2
    assert runs(tmp_path / "killed", "relu", "silu") == runs(whole, "relu", "silu")
    assert 2 * STEPS <= steps <= 2 * STEPS + deaths * EVERY, "what was half done is gone on with"


@pytest.mark.parametrize("anew", [False, True])
def test_finished_jobs_are_skipped(sweep, whole, tmp_path, anew):
    """`anew` is the control: jobs that begin again."""
    shutil.copytree(whole, tmp_path / "copy")

    def before():
        counting(tmp_path / "steps")
        if anew:
            session.ended = session.starting_point = lambda *args: None  # type: ignore[assignment]

    acts = "model.act=silu" if anew else "model.act=relu,silu"
    assert sweep(tmp_path / "copy", acts, before=before) == 0
    assert (tmp_path / "steps").stat().st_size == (STEPS if anew else 0)
    assert runs(tmp_path / "copy", "relu", "silu") == runs(whole, "relu", "silu")


# -- in parallel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(text_folder, tmp_path, monkeypatch) -> Callable[..., subprocess.Popen]:
    """`typed("sweep", "model.act=relu,silu")`: the command as a user types it, in a process group of its own."""
    monkeypatch.setenv("BAD_JOBS", str(tmp_path))
    words = ["--plugin", str(PLUGIN), "-m", *WORDS, f"data.path={text_folder}", "train.max_steps=40"]
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]

    def go(folder: str, *more: str) -> subprocess.Popen:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "run.py"), *words, *more]
        return subprocess.Popen(command, cwd=tmp_path / folder, start_new_session=True, stderr=subprocess.DEVNULL)

    return go


@pytest.mark.soak
def test_in_parallel_a_signal_to_one_job_leaves_the_others(typed, tmp_path):
    acts = "model.act=relu,stopped,raising,diverging,silu"
    assert typed("sweep", acts).wait() == 128 + signal.SIGTERM
    assert jobs(tmp_path / "sweep") == ["finished", "preempted", "crashed", "diverged", "finished"]
    assert typed("sweep", acts).wait() == 1
    assert jobs(tmp_path / "sweep") == ["finished", "finished", "crashed", "diverged", "finished"]


@pytest.mark.soak
def test_in_parallel_all_are_killed_and_gone_on_with(typed, tmp_path):
    """A killed worker takes the others with it; a killed group of processes is a machine taken away."""
    acts = ["relu", "killed", "gelu", "silu"]
    choice = f"model.act={','.join(acts)}"
    (tmp_path / "Killed").touch()
    assert typed("whole", choice).wait() == 0
    (tmp_path / "Killed").unlink()
    assert typed("sweep", choice).wait() != 0
    assert "interrupted" in jobs(tmp_path / "sweep")
    draw = random.Random(0)
    for _ in range(3):
        process = typed("sweep", choice)
        try:
            process.wait(timeout=draw.uniform(5, 12))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert typed("sweep", choice).wait() == 0
    assert jobs(tmp_path / "sweep") == ["finished"] * 4
    assert runs(tmp_path / "sweep", *acts) == runs(tmp_path / "whole", *acts)

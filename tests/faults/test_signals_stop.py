"""Real processes, real signals: the step is finished, the state saved, and the run goes on to the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normfree.runs import load_run

ROOT = Path(__file__).parents[2]
WORDS = ["model=normfree", "data=files", "data.tokenizer=bytes", "model.n_layer=2", "model.n_head=2", "model.n_embd=16"]
WORDS += ["model.block_size=16", "model.dropout.resid=0.1", "train.batch_size=4", "train.micro_batch_size=2"]
WORDS += ["train.checkpoint_every=0", "train.eval_every=0", "train.eval_tokens=64", "diagnostics.probe_sequences=2"]
WORDS += ["log.figures=false", "log.tensorboard=false", "log.every=1", "diagnostics.every=50", "optim.lr=1e-3"]


def start(text_folder: Path, run_dir: str | None, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), *WORDS, f"data.path={text_folder}", *words]
    command += [f"run_dir={run_dir}"] if run_dir else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(process: subprocess.Popen, run_dir: str, steps: int) -> None:
    path = Path(run_dir) / "metrics.jsonl"
    for _ in range(600):
        if path.exists() and path.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run took no steps within 30 seconds")


def final_bytes(run_dir: str) -> list[bytes]:
    run = load_run(run_dir)
    assert run.status["status"] == "finished"
    files = sorted((run.directory / "arrays").glob("*.bin"))
    last = run.checkpoints[-1][1]
    return [path.read_bytes() for path in (*files, last / "model.safetensors", last / "optimizer.safetensors")]


def test_stopped_by_each_signal_and_started_again_it_ends_with_the_same_bytes(text_folder):
    steps = "train.max_steps=240"
    whole = start(text_folder, "whole", steps)
    assert whole.wait(timeout=120) == 0, whole.communicate()[0]
    for i, signum in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        process = start(text_folder, "run", steps)
        wait_for_steps(process, "run", 20 + 60 * i)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, output
        run = load_run("run")
        assert run.status["status"] == "preempted"
        assert run.status["last_step"] == run.checkpoints[-1][0] > 0, "its own step was saved, though none was due"
        assert signal.Signals(signum).name in output
        assert "Traceback" not in output
    process = start(text_folder, "run", steps)
    assert process.wait(timeout=120) == 0
    assert final_bytes("run") == final_bytes("whole")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(text_folder, second):
    """The first is ignored here, as in the middle of a step that never ends; nothing is saved, nothing is broken."""
    endless = "import sys, time; sys.argv[0] = 'run.py'\n"
    endless += "from normfree.training.loop import Trainer\n"
    endless += "def stuck(self, step, due):\n    print('in the step', flush=True)\n    while True: time.sleep(0.01)\n"
    endless += "Trainer.train_step = stuck\nfrom normfree.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", endless, *WORDS, f"data.path={text_folder}", "run_dir=run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "in the step" in line:
            break
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(second)
    assert process.wait(timeout=10) == 128 + second
    again = start(text_folder, "run", "train.max_steps=5")
    assert again.wait(timeout=120) != 0, "another configuration: its length is not that run's"


def test_a_sweep_that_is_asked_to_stop_says_how_far_it_came(text_folder):
    process = start(text_folder, None, "train.max_steps=2000", "-m", "seed=1,2")
    for _ in range(600):
        found = list(Path("runs").glob("*/metrics.jsonl"))
        if found and found[0].read_bytes().count(b"\n") > 20:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.count("preempted") >= 2, "in its own line and in the sweep's table"
    assert len(list(Path("runs").glob("*-s?"))) == 1, "the second job was not begun"

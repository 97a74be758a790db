"""Real processes, real signals: the step is finished, the state saved, and the run goes on to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crashes import in_child, record

from normfree.cli import run_config
from normfree.runs import load_run
from normfree.training.loop import Trainer
from normfree.training.signals import ASKED, Signals

ROOT = Path(__file__).parents[2]
WORDS = ["model=normfree", "data=files", "data.tokenizer=bytes", "model.n_layer=2", "model.n_head=2", "model.n_embd=16"]
WORDS += ["model.block_size=16", "model.dropout.resid=0.1", "train.batch_size=4", "train.micro_batch_size=2"]
WORDS += ["train.checkpoint_every=0", "train.eval_every=0", "train.eval_tokens=64", "diagnostics.probe_sequences=2"]
WORDS += ["log.figures=false", "log.tensorboard=false", "log.every=1", "diagnostics.every=50", "optim.lr=1e-3"]

LONG = {"model.dropout.resid": 0.1, "train.micro_batch_size": 4, "train.max_steps": 90, "train.checkpoint_every": 0}
LONG |= {"train.eval_every": 0, "diagnostics.every": 30, "optim.lr": 1e-3}


@pytest.fixture
def train(tiny, tmp_path):
    """`train(folder, **changes)`: in this process, the run in `tmp_path/folder`; its exit code."""
    torch.compiler.reset()  # imports what every forked process would import for itself, for two seconds
    return lambda folder, **changes: run_config(tiny(run_dir=str(tmp_path / folder), **(LONG | changes))).exit_code


def start(train, folder: str) -> int:
    """Train in a forked process; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = train(folder)
        finally:
            os._exit(code)
    return child


def wait_for_rows(run_dir: Path, rows: int) -> None:
    path = run_dir / "metrics.jsonl"
    for _ in range(12_000):
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.005)
    raise AssertionError("the run took no steps within a minute")


def test_a_terminal_that_is_gone_costs_no_checkpoint(monkeypatch):
    def gone(*args):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    signals = Signals()
    signals._handle(signal.SIGTERM, None)
    assert signals.received == signal.SIGTERM


def send(child: int, signum: int) -> int:
    """Send the signal and wait for the end: the exit code, -n where the process died of signal n."""
    os.kill(child, signum)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_stopped_by_each_signal_and_started_again_it_ends_with_the_same_bytes(train, tmp_path):
    assert in_child(lambda: train("whole")) == 0
    for i, signum in enumerate(ASKED):
        child = start(train, "run")
        wait_for_rows(tmp_path / "run", 10 + 15 * i)
        assert send(child, signum) == 128 + signum
        run = load_run(tmp_path / "run")
        assert run.status["status"] == "preempted"
        assert signal.Signals(signum).name in run.status["reason"]
        assert run.status["last_step"] == run.checkpoints[-1][0] > 0, "its own step was saved, though none was due"
        assert run.series("train/loss")[0][-1] == run.status["last_step"] - 1, "a step was trained and lost"
    assert in_child(lambda: train("run")) == 0
    ours, theirs = record(tmp_path / "run"), record(tmp_path / "whole")
    last = "checkpoints/step-00000090"
    assert len([name for name in theirs if name.endswith(".bin")]) > 20
    for name in theirs:
        if name.endswith((".bin", ".jsonl")) or (name.startswith(last) and name.endswith(".safetensors")):
            assert ours[name] == theirs[name], name


@pytest.mark.parametrize("signum", ASKED)
def test_without_a_handler_the_same_signal_loses_steps(train, tmp_path, monkeypatch, signum):
    """The control: the process dies of it, or of the KeyboardInterrupt, and no checkpoint has its step."""
    monkeypatch.setattr("normfree.training.signals.ASKED", ())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        child = start(train, "run")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_rows(tmp_path / "run", 10)
    assert send(child, signum) == (1 if signum == signal.SIGINT else -signum)
    assert load_run(tmp_path / "run").checkpoints == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(train, tmp_path, monkeypatch, second):
    """The first is not heeded here, as in the middle of a step that never ends; what was saved before stays good."""

    def stuck(self, step, due):
        if step == 4:
            (tmp_path / "in the step").touch()
            while True:
                time.sleep(0.005)
        original(self, step, due)

    original = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stuck)
        patch.setitem(LONG, "train.checkpoint_every", 3)
        patch.setitem(LONG, "train.max_steps", 6)
        child = start(train, "run")
        while not (tmp_path / "in the step").exists():
            time.sleep(0.005)
        os.kill(child, signal.SIGTERM)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first signal waits for the step"
        assert send(child, second) == 128 + second
        assert [step for step, _ in load_run(tmp_path / "run").checkpoints] == [3]
        patch.setattr(Trainer, "train_step", original)
        assert in_child(lambda: train("run")) == 0
        assert load_run(tmp_path / "run").status["started_from_step"] == 3


def test_a_sweep_that_is_asked_to_stop_says_how_far_it_came(text_folder):
    """Through the command itself: the process ends with 128 + n."""
    command = [sys.executable, str(ROOT / "run.py"), *WORDS, f"data.path={text_folder}", "train.max_steps=2000"]
    process = subprocess.Popen(
        [*command, "-m", "seed=1,2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(600):
        found = list(Path("runs").glob("*/metrics.jsonl"))
        if found and found[0].read_bytes().count(b"\n") > 20:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    assert output.count("preempted") >= 2, "in its own line and in the sweep's table"
    assert len(list(Path("runs").glob("*-s?"))) == 1, "the second job was not begun"

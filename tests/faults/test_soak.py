"""The long ones: 60 random deaths, and 500 faults of every kind. `pytest -m soak -n 0 -s tests/faults` says the counts.

Nothing that was saved may be lost, and nothing may be silently wrong: `Trial` looks after every fault.
"""

import collections
import os
import random
import signal
import time
from pathlib import Path

import pytest
from crashes import same
from trial import Trial

from normfree.cli import run_config
from normfree.runs import load_run

BASE = {
    "model.norm": "none",
    "model.dropout.resid": 0.1,
    "train.micro_batch_size": 4,
    "train.max_steps": 24,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 3,
    "optim.schedule": "cosine",
    "diagnostics.statistics": ["attn_entropy", "grad_norm", "update_norm", "position_entropy"],
}
NAN = {"debug.inject.step": 14, "debug.inject.module": "blocks.1.mlp.fc"}
POLICIES = {"raise": {}, "skip": NAN | {"nan_policy": "skip"}, "rollback": NAN | {"nan_policy": "rollback"}}
BETWEEN = ("flip", "cut", "tear", "prune")
INSIDE = ("kill", "kill", "kill", "full", "full", "signal")


@pytest.mark.soak
def test_sixty_random_deaths(tiny, tmp_path):
    """By the clock, which knows nothing of what the process is doing."""
    settings = BASE | {"train.max_steps": 120, "train.checkpoint_every": 4, "diagnostics.statistics": None}
    began = time.monotonic()
    whole = run_config(tiny(run_dir=str(tmp_path / "whole"), **settings)).run_dir
    seconds = time.monotonic() - began
    draw, deaths, ends = random.Random(0), 0, 0
    while deaths < 60:
        run_dir, code = tmp_path / f"run-{ends}", -signal.SIGKILL
        while code:
            child = os.fork()
            if child == 0:
                os._exit(run_config(tiny(run_dir=str(run_dir), **settings)).exit_code)
            code = killed_after(child, draw.uniform(0.02, 0.3) * seconds) if deaths < 60 else wait(child)
            assert code in (0, -signal.SIGKILL)
            deaths += code != 0
        assert same(run_dir, whole)
        ends += 1
    print(f"{deaths} deaths of {ends} runs")


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(child: int, seconds: float) -> int:
    """Its exit code; it dies after so many seconds, unless it has ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def one_fault(trial: Trial, kind: str, draw: random.Random) -> bool:
    """Whether it could be done: nothing is damaged where nothing was saved."""
    last = draw.randint(1, 700)
    if kind == "kill":
        trial.kill(last)
    elif kind == "full":
        trial.fill_disk(last, draw.choice((0, 200, 3000)), draw.randint(1, 400))
    elif kind == "signal":
        trial.ask_to_stop(last, draw.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)))
    elif kind in ("flip", "cut"):
        return trial.damage_newest(draw.randint(0, 4), draw.random(), draw.randint(0, 7) if kind == "flip" else None)
    elif kind == "tear":
        trial.tear(draw.randbytes(draw.randint(0, 60)))
    else:
        trial.prune(draw.randint(1, 3))
    return True


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*training goes on without")
def test_five_hundred_mixed_faults(tiny, tmp_path):
    """With a NaN planted in two runs of three. Where a run goes back to hangs on which checkpoints there are, so under
    rollback there are no signals, which save one of their own, and no full disks, which cost one."""
    wholes: dict[str, Path] = {}
    for policy, changes in POLICIES.items():
        every = {"train.keep_checkpoints": 99} | ({} if policy == "rollback" else {"train.checkpoint_every": 1})
        wholes[policy] = run_config(tiny(run_dir=str(tmp_path / policy), **BASE | changes | every)).run_dir
        assert load_run(wholes[policy]).status["status"] == "finished"
    draw, faults, lives, runs = random.Random(0), collections.Counter(), 0, 0
    while faults.total() < 500:
        policy = list(POLICIES)[runs % 3]
        settings = BASE | POLICIES[policy]
        rolls_back = policy == "rollback"
        folder = tmp_path / f"run-{runs}"
        trial = Trial(lambda run_dir, s=settings: tiny(run_dir=run_dir, **s), folder, wholes[policy], rolls_back)
        while not trial.done and faults.total() < 500:
            kind = draw.choice(("kill",) if rolls_back else INSIDE)
            faults[kind] += one_fault(trial, kind, draw)
            if not trial.done and draw.random() < 0.7:
                kind = draw.choice(BETWEEN)
                faults[kind] += one_fault(trial, kind, draw)
        trial.finish()
        faults["NaN"] += policy != "raise"
        lives, runs = lives + trial.lives, runs + 1
    print(f"{faults.total()} faults, {dict(faults)}, in {lives} lives of {runs} runs")

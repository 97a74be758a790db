"""A run that steps, saves, dies, is damaged, finds the disk full and goes on, in any order (hypothesis)."""

import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from crashes import die
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from trial import Trial

from normfree.cli import run_config
from normfree.config import Config
from normfree.runs import load_run
from normfree.training import checkpoint as ckpt
from normfree.training import session
from normfree.training.loop import Trainer

SHORT = {
    "model.n_layer": 1,
    "model.n_embd": 8,
    "model.dropout.resid": 0.1,
    "train.micro_batch_size": 4,
    "train.max_steps": 10,
    "train.keep_checkpoints": 3,
    "diagnostics.statistics": ["attn_entropy", "grad_norm"],
    "optim.schedule": "cosine",
}
OPERATIONS = st.integers(1, 300)  # a life that is not disturbed has about as many
alive = precondition(lambda machine: not machine.trial.done)


class Machine(RuleBasedStateMachine):
    """After every rule, `Trial` looks at what must hold."""

    build: Callable[[str], Config]
    whole: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.trial = Trial(type(self).build, self.folder / "run", type(self).whole)

    @alive
    @rule(last=OPERATIONS)
    def killed(self, last: int) -> None:
        self.trial.kill(last)

    @alive
    @rule(last=OPERATIONS, signum=st.sampled_from([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
    def asked_to_stop(self, last: int, signum: int) -> None:
        self.trial.ask_to_stop(last, signum)

    @alive
    @rule(last=OPERATIONS, size=st.sampled_from([0, 100, 2000]), window=st.integers(1, 200))
    def disk_full(self, last: int, size: int, window: int) -> None:
        self.trial.fill_disk(last, size, window)

    @alive
    @rule(file=st.integers(0, 4), place=st.floats(0, 1, exclude_max=True), bit=st.none() | st.integers(0, 7))
    def newest_damaged(self, file: int, place: float, bit: int | None) -> None:
        self.trial.damage_newest(file, place, bit)

    @alive
    @rule(junk=st.binary(max_size=40))
    def torn(self, junk: bytes) -> None:
        self.trial.tear(junk)

    @rule(keep=st.integers(1, 3))
    def pruned(self, keep: int) -> None:
        self.trial.prune(keep)

    def teardown(self) -> None:
        if hasattr(self, "trial"):
            self.trial.finish()
            shutil.rmtree(self.folder)


@pytest.fixture
def whole(tiny, tmp_path) -> Path:
    return undisturbed(tiny, tmp_path)


def undisturbed(tiny, tmp_path: Path) -> Path:
    every = SHORT | {"train.checkpoint_every": 1, "train.keep_checkpoints": 99}
    return run_config(tiny(run_dir=str(tmp_path / "whole"), **every)).run_dir


def run_machine(tiny, whole: Path, examples: int, rules: int) -> None:
    build = staticmethod(lambda run_dir: tiny(run_dir=run_dir, **SHORT))
    profile = settings(
        derandomize=True,
        deadline=None,
        max_examples=examples,
        stateful_step_count=rules,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(type("Built", (Machine,), {"build": build, "whole": whole}), settings=profile)


def test_whatever_happens_in_whatever_order(tiny, whole):
    run_machine(tiny, whole, examples=3, rules=5)


@pytest.mark.soak
def test_whatever_happens_in_whatever_order_at_length(tiny, whole):
    run_machine(tiny, whole, examples=40, rules=12)


def no_moments() -> None:
    load = ckpt._load_tensors
    ckpt._load_tensors = lambda p: {k: t * 0 if k.startswith("exp_avg/") else t for k, t in load(p).items()}


def no_verification() -> None:
    """The newest is the one with the highest name, and what is in it is believed."""
    ckpt.newest_good = session.ckpt.newest_good = lambda run_dir, finite=True: load_run(run_dir).checkpoints[-1]
    ckpt.verify = lambda path: {"step": int(path.name[5:]), "finite": True}


def no_truncation() -> None:
    session.truncate = lambda run_dir, step: None


def dies_in_the_eighth_step() -> None:
    original = Trainer.train_step

    def step(self, at, due):
        if at == 7:
            die()
        original(self, at, due)

    Trainer.train_step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [no_moments, no_verification, no_truncation])
def test_a_fault_of_the_trainer_is_caught(tiny, whole, tmp_path, fault):
    """The controls: what must hold does not, if the second life has the fault."""
    trial = Trial(lambda run_dir: tiny(run_dir=run_dir, **SHORT), tmp_path / "run", whole)
    assert trial.live(dies_in_the_eighth_step) == -signal.SIGKILL
    assert trial.good_steps() == [2, 4, 6]
    if fault is no_verification:
        assert trial.damage_newest(file=0, place=0.9, bit=6)

    def rest() -> None:
        trial.live(fault)
        trial.finish()

    with pytest.raises(AssertionError):
        rest()

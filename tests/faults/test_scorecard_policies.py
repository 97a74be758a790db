"""Any sequence of good and bad steps, under each policy: what the trainer does is what the policy says, to the bit.

The trainer, its optimizer and its checkpoints are real; only what the backward pass gives is scripted.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.config import Config, resolve, resolve_vocabulary
from normfree.data.packing import prepare
from normfree.diagnostics.inject import VALUES
from normfree.training import checkpoint as ckpt
from normfree.training import faults
from normfree.training.checkpoint import load_weights
from normfree.training.faults import FiniteFlag, SpikeWatch
from normfree.training.loop import Trainer
from normfree.training.optimizer import build_optimizer, clip_divisor, gradient_norms
from normfree.training.schedules import learning_rate

STEPS, EVERY, WINDOW, SIGMA, RETRIES = 14, 4, 4, 6.0, 2
STATE = ("step", "exp_avg", "exp_avg_sq")
CPU = torch.device("cpu")
KINDS = ("nan loss", "inf loss", "nan gradient", "-inf gradient", "huge gradients", "spike")
# What a step meets, every time it is run; "good" twice as often as all else together.
scripts = st.lists(st.sampled_from(KINDS + ("good",) * 12), min_size=STEPS, max_size=STEPS)


def loss_of(step: int, kind: str) -> float:
    loss = 2.0 + random.Random(step).uniform(-0.1, 0.1)
    return {"nan loss": float("nan"), "inf loss": float("inf"), "spike": loss + 50}.get(kind, loss)


def set_gradients(parameters, step: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    first = parameters[0].grad.view(-1)
    if kind in ("nan gradient", "-inf gradient"):
        first[3] = VALUES[kind.split()[0]]
    if kind == "huge gradients":  # each is finite, their norm is not
        first.fill_(3e38)


class NoRecord:
    """Takes whatever a `Record` takes, and keeps nothing of it."""

    tokens, last_loss, tokens_per_second = 0, 0.0, 0.0

    def __getattr__(self, name):
        return (lambda *args: None) if name != "writer" else self


class Bar:
    n = 0

    def update(self, n=1):
        self.n += n

    def set_postfix_str(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def trainer(text_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    config = Config(name="tiny")
    for name, value in {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "norm": "none"}.items():
        setattr(config.model, name, value)
    config.data.source, config.data.path, config.data.tokenizer = "files", str(text_folder), "bytes"
    config.data.cache_dir, config.data.seq_len = str(folder / "cache"), 4
    config.train.max_steps, config.train.batch_size, config.train.eval_tokens = STEPS, 2, 8
    config.train.eval_every = config.train.checkpoint_every = config.diagnostics.every = 0
    config.diagnostics.watch, config.diagnostics.probe_sequences, config.train.precision = "off", 0, "fp32"
    config.optim.lr, config.spike_sigma, config.rollback.retries = 1e-2, SIGMA, RETRIES
    config = resolve(config)
    corpus = prepare(config.data, report=lambda line: None)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    made = Trainer(config, corpus, folder / "run", CPU)
    made.evaluate = lambda step, record: None
    made.initial = [p.detach().clone() for p in made.parameters]
    return made


def reset(trainer: Trainer, policy: str, lag: int, folder: Path) -> None:
    """As new, under `policy`; the host learns of a step `lag` steps later, as on a GPU."""
    (folder / "config.yaml").touch()
    trainer.config.nan_policy, trainer.run_dir, trainer.mailbox.lag = policy, folder, lag
    trainer.config.train.checkpoint_every = EVERY if policy == "rollback" else 0
    trainer.mailbox._waiting.clear()
    with torch.no_grad():
        for p, initial in zip(trainer.parameters, trainer.initial, strict=True):
            p.copy_(initial)
    trainer.optimizer.state.clear()
    trainer.flag = FiniteFlag(policy, CPU)
    trainer.optimizer.found_inf = trainer.flag.mask
    trainer.spikes = SpikeWatch(SIGMA, CPU, WINDOW)
    trainer.rollbacks = faults.Rollbacks(trainer.config.rollback)


@dataclass
class Outcome:
    ended: str
    bad_steps: int
    weights: list[torch.Tensor]
    taken: int = 0  # training steps, those done again among them


def run(trainer: Trainer, script: list[str], policy: str, folder: Path, monkeypatch, lag: int = 0) -> Outcome:
    """Train by the script."""
    reset(trainer, policy, lag, folder)
    taken = 0

    def scripted(step, rows, count):
        nonlocal taken
        taken += 1
        assert taken <= (RETRIES + 1) * STEPS + lag, "it does not come to its end"
        set_gradients(trainer.parameters, step, script[step])
        return torch.tensor(loss_of(step, script[step])), torch.zeros((), dtype=torch.int64)

    monkeypatch.setattr(trainer, "backward_passes", scripted)
    monkeypatch.setattr(
        "normfree.training.loop.autopsy", lambda trainer, step, *_, **__: faults.Diverged(step, f"step {step}")
    )
    ended, bad = "finished", 0
    try:
        trainer.fit(0, NoRecord(), Bar())
        bad = int(trainer.flag.bad_steps)
    except faults.Diverged as error:
        ended = f"diverged at {error.step}"
    return Outcome(ended, bad, tensors(trainer, trainer.optimizer), taken)


def is_bad(kind: str, step: int, window: list[float]) -> bool:
    if kind not in ("good", "spike"):
        return True
    losses = torch.tensor(window)  # of the last good steps
    return len(window) == WINDOW and bool(loss_of(step, kind) > losses.mean() + SIGMA * losses.std())


def expected(trainer: Trainer, script: list[str], policy: str) -> Outcome:
    """The same by the rules alone: a list of the updates that count, applied by an optimizer that knows no mask."""
    updates: list[tuple[int, float]] = []
    left_out: list[int] = []
    ended, bad, step, row = "finished", 0, 0, 0
    while step < STEPS:
        window = [loss_of(s, script[s]) for s, _ in updates][-WINDOW:]
        if step in left_out:
            step += 1
        elif not is_bad(script[step], step, window):
            factor = trainer.config.rollback.lr_factor ** len(left_out)  # rollback.steps is longer than the run
            updates.append((step, learning_rate(step, STEPS, trainer.config.optim) * factor))
            step, row = step + 1, 0
        elif policy == "skip":
            step, bad, row = step + 1, bad + 1, row + 1
            if row == faults.MAX_SKIPS:
                ended, bad, step = f"diverged at {step - 1}", 0, STEPS
        elif policy == "rollback" and len(left_out) < RETRIES:
            left_out.append(step)
            step -= step % EVERY
            updates = [(s, lr) for s, lr in updates if s < step]
        else:
            ended, step = f"diverged at {step}", STEPS
    return Outcome(ended, bad, apply(trainer, updates, script))


def apply(trainer: Trainer, updates: list[tuple[int, float]], script: list[str]) -> list[torch.Tensor]:
    """Weights and moments after the updates (step, lr)."""
    model = trainer.model
    with torch.no_grad():
        for p, initial in zip(trainer.parameters, trainer.initial, strict=True):
            p.copy_(initial)
    optimizer = build_optimizer(model, trainer.config.optim)
    for step, lr in updates:
        set_gradients(trainer.parameters, step, script[step])
        norm = gradient_norms(trainer.parameters).norm()
        optimizer.found_inf = torch.zeros(())
        optimizer.grad_scale = clip_divisor(norm, trainer.config.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return tensors(trainer, optimizer)


def same(one: Outcome, two: Outcome) -> bool:
    if (one.ended, one.bad_steps) != (two.ended, two.bad_steps):
        return False
    return all(bool((a == b).all()) for a, b in zip(one.weights, two.weights, strict=True))


def tensors(trainer: Trainer, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights and moments. A masked first step makes moments, all zero; where none was taken, zeros stand for them."""
    states = [optimizer.state[p].get(name, torch.zeros(())) for p in trainer.parameters for name in STATE]
    return [p.detach().clone() for p in trainer.parameters] + states


EXAMPLES = {"raise": 25, "skip": 40, "rollback": 30}


@pytest.mark.parametrize("policy", EXAMPLES)
def test_any_sequence_ends_as_the_policy_says(trainer, policy, tmp_path_factory):
    @settings(deadline=None, derandomize=True, max_examples=EXAMPLES[policy], database=None)
    @given(script=scripts, lag=st.sampled_from([0, faults.LAG]), skips=st.sampled_from([3, faults.MAX_SKIPS]))
    def check(script, lag, skips):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(faults, "MAX_SKIPS", skips)
            done = run(trainer, script, policy, tmp_path_factory.mktemp("run"), patch, lag)
            assert all(t.isfinite().all() for t in done.weights)
            assert same(done, expected(trainer, script, policy)), done.ended

    check()


# -- controls: what must not pass -------------------------------------------------------------------------------------


SCRIPT = ["good"] * 5 + ["nan gradient"] + ["good"] * 3 + ["spike"] + ["good"] * 4


def blended(self, loss, good):
    """Multiplying by 0 or 1 in place of choosing: 0 * NaN is NaN."""
    here = torch.arange(WINDOW) == self.seen % WINDOW
    self.losses.lerp_(loss.expand(WINDOW), (here & good).float())
    self.seen.add_(good)


def everything(self, loss, good):
    self.losses[self.seen % WINDOW] = loss
    self.seen.add_(1)


@pytest.mark.parametrize("take", [None, blended, everything])
def test_one_nan_under_skip_and_the_steps_after_it(trainer, tmp_path, monkeypatch, take):
    """The healthy step after it is applied, and the spike four steps later still seen; unless NaN is in the window."""
    script = [*SCRIPT]
    script[5] = "nan loss"
    if take is not None:
        monkeypatch.setattr(SpikeWatch, "take", take)
    done = run(trainer, script, "skip", tmp_path, monkeypatch)
    healthy = expected(trainer, script, "skip")
    assert same(done, healthy) == (take is None)
    if take is None:
        steps = done.weights[len(trainer.parameters)]
        assert (done.bad_steps, steps) == (2, STEPS - 2)
        assert trainer.spikes.losses.isfinite().all()


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_optimizer_that_knows_no_mask_is_caught(trainer, tmp_path, monkeypatch, policy):
    wanted = expected(trainer, SCRIPT, policy)
    assert same(run(trainer, SCRIPT, policy, tmp_path, monkeypatch), wanted)
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(FiniteFlag, "judge", lambda self, finite, step, overflow: judge(self, finite, step))
    assert not same(run(trainer, SCRIPT, policy, tmp_path / "again", monkeypatch), wanted)


def judge(flag: FiniteFlag, finite: torch.Tensor, step: int) -> None:
    """Notes the bad step, and masks nothing."""
    flag.first_bad.copy_(torch.where(~finite & (flag.first_bad < 0), step, flag.first_bad))
    flag.bad_steps.add_(~finite)


def test_going_back_with_the_moments_of_later_steps_is_caught(trainer, tmp_path, monkeypatch):
    """To step 0, whose checkpoint has none: they must go."""
    script = ["good"] * 2 + ["nan loss"] + ["good"] * 11
    wanted = expected(trainer, script, "rollback")
    assert same(run(trainer, script, "rollback", tmp_path, monkeypatch), wanted)
    (tmp_path / "again").mkdir()

    def weights_only(model, optimizer, extra, checkpoint):
        load_weights(model, checkpoint)
        return 0

    monkeypatch.setattr(ckpt, "load_training_state", weights_only)
    assert not same(run(trainer, script, "rollback", tmp_path / "again", monkeypatch), wanted)


def test_skipping_without_end_is_stopped(trainer, tmp_path, monkeypatch):
    """A loss that has moved for good: every step is a spike, and no window would ever take it in."""
    monkeypatch.setattr(faults, "MAX_SKIPS", 5)
    script = ["good"] * 5 + ["spike"] * 9
    assert run(trainer, script, "skip", tmp_path, monkeypatch).ended == "diverged at 9"

"""nan_policy=rollback: back to the last good checkpoint, without the bad batch, at a lower rate, and exactly so."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from normfree.cli import run_config
from normfree.errors import EXIT_DIVERGED
from normfree.runs import load_run
from normfree.training.faults import SpikeWatch
from normfree.training.loop import Trainer

PLANTED = {"debug.inject.step": 5, "debug.inject.module": "blocks.1.mlp.fc"}
SETTINGS = {"nan_policy": "rollback", "train.max_steps": 9, "train.checkpoint_every": 2, "model.dropout.resid": 0.1}


def state(run):
    files = (load_file(run.checkpoints[-1][1] / f"{kind}.safetensors") for kind in ("model", "optimizer"))
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def test_a_fault_costs_its_batch_and_lowers_the_rate(train_tiny):
    run = train_tiny(**SETTINGS, **PLANTED)
    assert run.status["status"] == "finished"
    assert [e["step"] for e in run.status["events"] if e["kind"] == "rollback"] == [5]
    steps, rates = run.series("lr")
    assert steps.tolist() == [0, 1, 2, 3, 4, 6, 7, 8], "step 5 is left out, nothing is there twice"
    assert rates[:4] == pytest.approx(0.01)
    assert rates[4:] == pytest.approx(0.0025)
    assert all(tensor.isfinite().all() for tensor in state(run).values())


@pytest.mark.parametrize("stop", [4, 6, 7])
def test_stopped_before_or_after_a_rollback_it_ends_with_the_same_bytes(train_tiny, monkeypatch, stop):
    whole = train_tiny("whole", **SETTINGS, **PLANTED)
    original = Trainer.train_step

    def stopped(self, step, due):
        if step == stop:
            raise KeyboardInterrupt
        original(self, step, due)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("stopped", **SETTINGS, **PLANTED)
    again = train_tiny("stopped", **SETTINGS, **PLANTED)
    ours, theirs = state(again), state(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    for name in whole.array_names:
        for ours, theirs in zip(again.array(name), whole.array(name), strict=True):
            assert np.array_equal(ours, theirs, equal_nan=True), name


def test_faults_without_end_stop_the_run(tiny, tmp_path, monkeypatch):
    """Each retry meets another one; after the last, the state before the bad step is kept, as under raise."""
    original = Trainer.backward_passes

    def poisoned(self, step, rows, count):
        loss, bad = original(self, step, rows, count)
        return (loss * float("nan"), bad) if step >= 3 else (loss, bad)

    monkeypatch.setattr(Trainer, "backward_passes", poisoned)
    result = run_config(tiny(run_dir=str(tmp_path / "run"), **SETTINGS, **{"rollback.retries": 2}))
    run = load_run(result.run_dir)
    assert (result.status, result.exit_code) == ("diverged", EXIT_DIVERGED)
    assert [e["step"] for e in run.status["events"] if e["kind"] == "rollback"] == [3, 4]
    assert run.status["last_step"] == 5
    assert all(tensor.isfinite().all() for tensor in state(run).values())


def test_skipping_does_not_bring_back_what_rolling_back_does(train_tiny):
    """A rate far too high, without norms: skipping goes on skipping; with the rate taken back, training goes on."""
    settings = {"model.norm": "none", "model.act": "relu", "optim.lr": 3.0, "optim.warmup_steps": 10}
    settings |= {"optim.grad_clip": 0.0, "train.max_steps": 60, "train.checkpoint_every": 5, "diagnostics.every": 0}
    skipped = train_tiny("skip", nan_policy="skip", **settings)
    back = train_tiny("rollback", nan_policy="rollback", **settings, **{"rollback.lr_factor": 0.01})
    assert skipped.series("bad_steps")[1][-1] > 20
    assert back.status["status"] == "finished"
    assert back.status["val/loss"] < 5.6, "below the loss of a uniform guess over 257 ids"


def test_a_spike_is_a_bad_step_and_stays_out_of_the_window():
    watch = SpikeWatch(4.0, torch.device("cpu"), window=8)
    losses = torch.tensor([2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1])
    for loss in losses:
        assert not watch.is_spike(loss), "nothing is one before the window is full"
        watch.take(loss, torch.tensor(True))
    for value, spike in ((2.3, False), (3.0, True), (float("inf"), True), (float("nan"), False)):
        assert watch.is_spike(torch.tensor(value)) == spike, value
        watch.take(torch.tensor(value), torch.tensor(False))
    assert watch.losses.equal(losses), "what was not good did not enter"


def test_a_spike_in_a_run_is_skipped(train_tiny, monkeypatch):
    original = Trainer.backward_passes

    def spiked(self, step, rows, count):
        loss, bad = original(self, step, rows, count)
        return (loss + 50 if step == 70 else loss), bad

    monkeypatch.setattr(Trainer, "backward_passes", spiked)
    settings = {"train.max_steps": 75, "train.checkpoint_every": 0, "diagnostics.every": 0, "optim.lr": 1e-4}
    run = train_tiny(nan_policy="skip", spike_sigma=8.0, **settings)
    steps, bad = run.series("bad_steps")
    assert bad[steps < 70].max() == 0
    assert bad[steps == 70] == bad[-1] == 1

"""A statistic fails: it is left out from then on, the run says so, and ends with the same weights and records."""

import pytest
import torch
from crashes import record

from normfree.diagnostics import STATISTICS, Statistic
from normfree.diagnostics.hooks import Recorder
from normfree.diagnostics.parameters import ParameterStatistic
from normfree.training import machine

SETTINGS = {"model.dropout.resid": 0.1, "train.micro_batch_size": 4, "diagnostics.every": 1}
FAILING = 30  # calls until it fails: in a later step, not in its first layer


class Counting(Statistic):
    """Right for a while."""

    sites = ("mlp", "block")
    every_step = ("block",)
    calls = 0

    def measure(self, seen):
        type(self).calls += 1
        if self.calls > FAILING:
            raise ZeroDivisionError("no more")
        return seen.output.abs().amax()


class Late(Counting):
    """Fails where all layers are put together."""

    def finish(self, values):
        if self.calls >= FAILING:
            raise KeyError("late")
        return values


class WrongShape(Counting):
    def finish(self, values):
        return values[:-1] if self.calls >= FAILING else values


class Snapshot(Counting):
    snapshot = True
    every_step = ()


class OfUpdates(ParameterStatistic):
    of = "update"
    calls = 0

    def measure(self, seen):
        type(self).calls += 1
        if self.calls > 2:
            raise IndexError("no more")
        return torch.zeros(len(seen.tensors))


CLASSES = (Counting, Late, WrongShape, Snapshot, OfUpdates)


@pytest.fixture
def with_statistic(train_tiny):
    """`with_statistic(cls, folder, **changes)`: a run with `cls` among its statistics, as `mine`."""

    def go(cls, folder, **changes):
        cls.calls = 0
        STATISTICS.register("mine")(cls)
        try:
            return train_tiny(folder, **(SETTINGS | changes))
        finally:
            STATISTICS.remove("mine")

    return go


@pytest.mark.parametrize("watch", ["all", "off"])
def test_a_statistic_that_fails_costs_itself(train_tiny, with_statistic, watch):
    changes = {"diagnostics.watch": watch, "diagnostics.snapshot_every": 1}
    whole = train_tiny("whole", **SETTINGS, **changes)
    for cls in CLASSES:
        run = with_statistic(cls, cls.__name__, **changes)
        assert run.status["status"] == "finished"
        said = [e for e in run.status["events"] if e["kind"] == "left_out"]
        assert len(said) == 1
        assert "statistic mine is left out from here on" in said[0]["text"]
        assert len([w for w in run.status["warnings"] if "statistic mine" in w]) == 1
        steps, values = run.array("mine")
        assert steps.tolist() == list(range(len(steps)))
        assert 0 < len(steps) <= said[0]["step"] < 6, "what it gave before stays, and nothing comes after"
        assert (values >= 0).all()
        ours, theirs = record(run.directory), record(whole.directory)
        for name in theirs:
            if name.endswith((".bin", ".safetensors", "metrics.jsonl")):
                assert ours[name] == theirs[name], name


def test_a_statistic_outside_the_guard_is_caught(with_statistic, monkeypatch):
    """The control: without it the run ends with the statistic."""
    monkeypatch.setattr(Recorder, "_tried", lambda self, name, work, given: work(given))
    with pytest.raises(ZeroDivisionError, match="no more"):
        with_statistic(Counting, "run")


def test_a_statistic_that_fails_is_not_compiled(train_tiny, with_statistic, monkeypatch):
    """It is tried once before there is a graph, in which nothing can be left out any more."""

    class Broken(Statistic):
        def measure(self, seen):
            raise ZeroDivisionError("at once")

    def compiled(model, enabled):
        assert enabled
        return torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(machine, "compiled", compiled)
    changes = {"train.compile": True, "diagnostics.probe_sequences": 0, "model.n_layer": 1, "train.max_steps": 3}
    changes |= {"diagnostics.statistics": ["mine", "resid_max"], "train.micro_batch_size": 8}
    run = with_statistic(Broken, "run", **changes)
    assert run.status["status"] == "finished"
    assert [e["step"] for e in run.status["events"] if e["kind"] == "left_out"] == [0]
    assert not run.has("mine")
    assert len(run.array("resid_max")[0]) == 3


def test_a_failed_statistic_leaves_no_hole_in_the_postmortem(with_statistic):
    inject = {"debug.inject.step": 4, "debug.inject.module": "blocks.1.mlp.fc", "diagnostics.watch": "all"}
    run = with_statistic(Counting, "run", **inject)
    assert run.status["status"] == "diverged"
    assert run.status["fault"]["module"] == "blocks.1.mlp.fc"
    assert "resid_max" in (run.directory / "postmortem" / "step-00000004" / "README.txt").read_text()

"""TensorBoard or a figure fails: the run ends with the same weights, and says what is missing."""

import pytest
from crashes import record

from normfree.training import views
from normfree.training.loop import Trainer
from normfree.training.signals import Preempted

BOARD = {"log.tensorboard": True, "model.dropout.resid": 0.1}


def left_out(run) -> list[int]:
    return [event["step"] for event in run.status["events"] if event["kind"] == "left_out"]


def fails(patch, method: str, from_call: int = 1) -> list[int]:
    """TensorBoard's `method` raises from that call on; the list grows with each call."""
    original, calls = getattr(views.TensorBoard, method), []

    def failing(self, *args):
        calls.append(0)
        if len(calls) >= from_call:
            raise RuntimeError(f"{method} is broken")
        original(self, *args)

    patch.setattr(views.TensorBoard, method, failing)
    return calls


@pytest.mark.filterwarnings("ignore:TensorBoard is left out")
def test_a_view_that_fails_costs_itself(train_tiny, monkeypatch):
    """When it is made, at a row, at an array in the middle, at the end: given up at once, said once, with its step."""
    whole = train_tiny("whole", **BOARD)
    for method, from_call, step in (("__init__", 1, 0), ("scalars", 4, None), ("array", 60, None), ("finish", 1, None)):
        with monkeypatch.context() as patch:
            calls = fails(patch, method, from_call)
            run = train_tiny(method, **BOARD)
        assert len(calls) == from_call, "it was asked again"
        assert run.status["status"] == "finished"
        assert run.status["warnings"] == [f"TensorBoard: RuntimeError: {method} is broken"]
        assert len(left_out(run)) == (method != "finish")
        assert step is None or left_out(run) == [step]
        ours, theirs = record(run.directory), record(whole.directory)
        kept = [name for name in theirs if name.endswith((".bin", ".safetensors", "metrics.jsonl"))]
        assert len(kept) > 30
        assert all(ours[name] == theirs[name] for name in kept)


def test_a_view_outside_the_guard_is_caught(train_tiny, monkeypatch):
    """The control: without it the run ends with the view."""
    monkeypatch.setattr(
        views.Views, "_each", lambda self, method, *args: [getattr(v, method)(*args) for v in self.views]
    )
    fails(monkeypatch, "scalars", from_call=4)
    with pytest.raises(RuntimeError, match="is broken"):
        train_tiny(**BOARD)


@pytest.mark.filterwarnings("ignore:TensorBoard is left out")
def test_what_a_stopped_run_lacks_is_known(train_tiny, monkeypatch):
    """Its warnings are written when it ends; the event is there at once, and goes where the view is there again."""
    original = Trainer.train_step

    def stopped(self, step, due):
        if step == 5:
            raise Preempted(15, step)
        original(self, step, due)

    with monkeypatch.context() as patch:
        fails(patch, "scalars", from_call=4)
        patch.setattr(Trainer, "train_step", stopped)
        run = train_tiny(**BOARD)
    assert run.status["status"] == "preempted"
    assert left_out(run) == [2]
    again = train_tiny(**BOARD)
    assert again.status["status"] == "finished"
    assert again.status["started_from_step"] == 4
    assert left_out(again) == [2], "steps that are done again forget theirs; this one is not"


def test_a_figure_that_fails_costs_itself(train_tiny, monkeypatch):
    from plotting import entropy_ranges

    def broken(runs, fig):
        raise ZeroDivisionError("no range")

    monkeypatch.setattr(entropy_ranges, "plot", broken)
    run = train_tiny(**{"log.figures": True, "train.max_steps": 3})
    assert run.status["status"] == "finished"
    assert run.status["warnings"] == ["figure entropy_ranges.png: no range"]
    assert len(list((run.directory / "figures").iterdir())) >= 3

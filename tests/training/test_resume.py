"""A run that is stopped anywhere and started again ends with the bytes of the uninterrupted one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from normfree import register_statistic
from normfree.cli import run_config
from normfree.diagnostics import STATISTICS, Statistic
from normfree.errors import UserError
from normfree.runs import TIMES, Run, load_run
from normfree.training import checkpoint as ckpt
from normfree.training import session
from normfree.training.loop import Trainer

HARD = {
    "model.norm": "none",
    "model.act": "learnable_leaky_relu",
    "model.act_scope": "global",
    "model.dropout.embed": 0.1,
    "model.dropout.attn": 0.1,
    "model.dropout.resid": 0.1,
    "train.micro_batch_size": 4,
    "train.max_steps": 9,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 3,
}


def contents(run: Run) -> dict[str, object]:
    """Everything a run leaves behind but times, run.json and views."""
    found: dict[str, object] = {}
    for path in sorted(run.directory.rglob("*")):
        name = str(path.relative_to(run.directory))
        if path.suffix in (".bin", ".safetensors"):
            found[name] = path.read_bytes()
        elif name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return found


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.train_step

    def interrupted(self: Trainer, at: int, *rest: object) -> None:
        if at == step:
            raise KeyboardInterrupt
        original(self, at, *rest)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


def interrupted_run(train_tiny, monkeypatch, step: int, **settings: object) -> Run:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("stopped", **settings)
    return train_tiny("stopped", **settings)


@pytest.mark.parametrize("step", [0, 5])  # tests/faults/test_scorecard_exact.py has every point, and every model
def test_same_bytes_wherever_it_stops(train_tiny, monkeypatch, step):
    whole = train_tiny("whole", **HARD)
    resumed = interrupted_run(train_tiny, monkeypatch, step, **HARD)
    assert contents(resumed) == contents(whole)
    assert resumed.status["status"] == "finished"


@pytest.mark.parametrize("lost", ["exp_avg/", "exp_avg_sq/", "step/"])
def test_a_lost_state_is_noticed(train_tiny, monkeypatch, lost):
    """The control: without one of the saved states the comparison above fails."""
    whole = train_tiny("whole", **HARD)
    load = ckpt._load_tensors

    def forgetful(path):
        return {k: t * 0 if k.startswith(lost) else t for k, t in load(path).items()}

    monkeypatch.setattr(ckpt, "_load_tensors", forgetful)
    assert contents(interrupted_run(train_tiny, monkeypatch, 5, **HARD)) != contents(whole)


def test_dropout_that_depends_on_more_than_the_step_is_noticed(train_tiny, monkeypatch):
    whole = train_tiny("whole", **HARD)
    original, calls = Trainer.seed_dropout, []

    def stateful(self, step, micro):
        calls.append(step)
        original(self, len(calls), micro)

    monkeypatch.setattr(Trainer, "seed_dropout", stateful)
    assert contents(interrupted_run(train_tiny, monkeypatch, 5, **HARD)) != contents(whole)


def test_two_whole_runs_are_equal(train_tiny):
    assert contents(train_tiny("one", **HARD)) == contents(train_tiny("two", **HARD))


def test_the_seed_changes_the_run(train_tiny):
    assert contents(train_tiny("one", **HARD)) != contents(train_tiny("two", seed=2, **HARD))


def test_statistics_change_nothing(train_tiny):
    """Weights and optimizer state of 50 steps are bit-identical with everything measured at every step and nothing."""
    settings = HARD | {"model.n_embd": 8, "train.batch_size": 4, "train.micro_batch_size": 2, "train.max_steps": 50}
    settings |= {"train.eval_every": 0, "train.checkpoint_every": 0, "train.eval_tokens": 16}
    everything = {"diagnostics.watch": "all", "diagnostics.every": 1, "diagnostics.snapshot_every": 1}
    plain = train_tiny("plain", **settings, **{"diagnostics.watch": "off", "diagnostics.every": 0})
    watched = train_tiny("watched", **settings, **everything)
    for kind in ("model", "optimizer"):
        ours, theirs = (load_file(run.checkpoints[-1][1] / f"{kind}.safetensors") for run in (plain, watched))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not plain.array_names
    assert set(STATISTICS) < set(watched.array_names)
    for name in STATISTICS:
        assert watched.array(name)[0].tolist() == list(range(50)), name


def test_a_statistic_that_changes_something_is_noticed(train_tiny):
    """The control: one that draws random numbers between two dropouts."""

    @register_statistic("drawing")
    class Drawing(Statistic):
        def measure(self, seen):
            return torch.rand(())

    try:
        plain = train_tiny("plain", **HARD, **{"diagnostics.every": 0})
        watched = train_tiny("watched", **HARD, **{"diagnostics.statistics": ["drawing"]})
    finally:
        STATISTICS.remove("drawing")
    ours, theirs = (load_file(run.checkpoints[-1][1] / "model.safetensors") for run in (plain, watched))
    assert not all(ours[name].equal(theirs[name]) for name in ours)


def test_the_same_command_again_trains_nothing(train_tiny, monkeypatch, capsys):
    first = train_tiny(**HARD)
    before = contents(first)
    stop_at(monkeypatch, 0)
    assert contents(train_tiny(**HARD)) == before
    assert "finished already" in capsys.readouterr().err


def test_a_checkpoint_is_not_taken_for_a_run(train_tiny, tiny, tmp_path):
    path = train_tiny().checkpoints[-1][1]
    with pytest.raises(UserError, match="is a checkpoint; name the run"):
        load_run(path)
    with pytest.raises(UserError, match="no run"):
        run_config(tiny(run_dir=str(path)))
    ckpt.verify(path)


def test_a_record_without_a_good_checkpoint_is_never_overwritten(train_tiny, tiny, tmp_path):
    run = train_tiny()
    for _, path in run.checkpoints:
        (path / "model.safetensors").write_bytes(b"")
    before = contents(run)
    with pytest.raises(UserError, match="none of its 2 checkpoints"):
        run_config(tiny(run_dir=str(tmp_path / "run"), resume="run", **{"train.max_steps": 9}))
    assert contents(run) == before


def test_a_run_finished_by_another_process_meanwhile_is_left_alone(train_tiny, monkeypatch):
    """Both see an empty directory; one trains to the end before the other holds the lock."""
    original, inner = session.Trainer, []

    def slow(*args):
        if not inner:
            inner.append(None)
            inner[0] = contents(train_tiny())
        return original(*args)

    monkeypatch.setattr(session, "Trainer", slow)
    outer = train_tiny()
    assert contents(outer) == inner[0]
    assert outer.status["started_from_step"] == 0


def test_resuming_does_not_need_what_the_run_began_from(train_tiny, monkeypatch):
    source = train_tiny("source")
    settings = {"init_from": str(source.directory), "train.max_steps": 9}
    whole = train_tiny("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("stopped", **settings)
    source.directory.rename(source.directory.with_name("moved"))
    monkeypatch.setattr("normfree.cli.is_run", lambda path: True)  # the early look at init_from
    assert contents(train_tiny("stopped", **settings)) == contents(whole)


def test_a_restart_without_diagnostics_ends_well(train_tiny, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train_tiny()
    run = train_tiny(**{"diagnostics.every": 0})
    assert run.status["status"] == "finished"
    assert run.array_names == []


@pytest.mark.parametrize("step", [1, 5])
def test_tensorboard_shows_each_step_once(train_tiny, monkeypatch, step):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second and process are read in the order of their numbers as text, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    run = interrupted_run(train_tiny, monkeypatch, step, **{"log.tensorboard": True})
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(run.series("train/loss")[1].tolist())


def test_fp16_resumes_with_its_scale(train_tiny, monkeypatch):
    settings = HARD | {"train.precision": "fp16"}
    whole = train_tiny("whole", **settings)
    assert contents(interrupted_run(train_tiny, monkeypatch, 5, **settings)) == contents(whole)


def test_an_extended_run_forgets_how_it_ended_before(train_tiny, monkeypatch):
    assert train_tiny().status["val/loss"] is not None
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(resume="run", **{"train.max_steps": 9})
    assert load_run("run").status["val/loss"] is None


def test_a_longer_run_answers_the_original_command(train_tiny, capsys):
    train_tiny()
    train_tiny(resume="run", **{"train.max_steps": 8})
    assert train_tiny().status["last_step"] == 8
    assert "finished already" in capsys.readouterr().err


def test_settings_that_change_no_weight_may_change_and_are_written_down(train_tiny, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(**HARD)
    run = train_tiny(**HARD, **{"diagnostics.every": 3})
    assert run.status["status"] == "finished"
    (event,) = [event for event in run.status["events"] if event["kind"] == "settings"]
    assert event["step"] == 4
    assert "diagnostics.every: 3, not 2" in event["text"]

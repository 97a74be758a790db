"""A run that is stopped anywhere and started again ends with the bytes of the uninterrupted one."""

import json

import pytest
from safetensors.torch import load_file

from normfree.runs import TIMES, Run
from normfree.training import checkpoint as ckpt
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


@pytest.mark.parametrize("step", [0, 1, 2, 5, 8])
def test_same_bytes_wherever_it_stops(train_tiny, monkeypatch, step):
    whole = train_tiny("whole", **HARD)
    resumed = interrupted_run(train_tiny, monkeypatch, step, **HARD)
    assert contents(resumed) == contents(whole)
    assert resumed.status["status"] == "finished"


def test_resume_crosses_an_epoch(train_tiny, monkeypatch):
    settings = HARD | {"data.max_documents": 2, "train.batch_size": 64, "train.micro_batch_size": 64}
    whole = train_tiny("whole", **settings)
    assert contents(interrupted_run(train_tiny, monkeypatch, 5, **settings)) == contents(whole)


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
    """Weights and optimizer state are bit-identical with hooks at every step and without any."""
    plain = train_tiny("plain", **HARD, **{"diagnostics.every": 0})
    watched = train_tiny("watched", **HARD, **{"diagnostics.every": 1})
    for kind in ("model", "optimizer"):
        ours, theirs = (load_file(run.checkpoints[-1][1] / f"{kind}.safetensors") for run in (plain, watched))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not plain.array_names
    assert len(watched.entropy) == 9


def test_the_same_command_again_trains_nothing(train_tiny, monkeypatch, capsys):
    first = train_tiny(**HARD)
    before = contents(first)
    stop_at(monkeypatch, 0)
    assert contents(train_tiny(**HARD)) == before
    assert "finished already" in capsys.readouterr().err

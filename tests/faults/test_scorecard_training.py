"""Whole runs: killed again and again, or on a disk that fills up, they end with the bytes of the undisturbed one."""

import contextlib
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from crashes import Operations, file_size_limit, in_child, record, same, small_disk

from normfree.cli import run_config
from normfree.errors import EXIT_DIRECTORY, EXIT_DISK, UserError
from normfree.records import RunWriter
from normfree.runs import load_run
from normfree.training import checkpoint as ckpt
from normfree.training.loop import Trainer

HARD = {
    "model.norm": "none",
    "model.dropout.resid": 0.1,
    "train.micro_batch_size": 4,
    "train.max_steps": 8,
    "train.keep_checkpoints": 1,
    "optim.schedule": "cosine",
}


@pytest.fixture
def train(tiny, tmp_path):
    """`train(folder, **changes)`: in this process, the run in `tmp_path/folder`; its exit code."""

    def go(folder: str, **changes: object) -> int:
        return run_config(tiny(run_dir=str(tmp_path / folder), **(HARD | changes))).exit_code

    return go


def killed_until_done(train, folder: str, tmp_path: Path, points, **changes: object) -> int:
    """Start the run again and again, each time killed at the next of `points`, until it ends; how often it died."""
    for deaths, last in enumerate(points):
        code = in_child(lambda last=last: (Operations(tmp_path / folder, last), train(folder, **changes)))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return deaths
    raise AssertionError("it never came to its end")


def points(seed: int):
    """How many operations each process lives: few enough to die often, more each time, so that it ends."""
    draw = random.Random(seed)
    return [draw.randint(30, 150 + 40 * i) for i in range(40)]


def test_killed_again_and_again_it_ends_with_the_same_bytes(train, tmp_path):
    assert train("whole") == 0
    assert killed_until_done(train, "killed", tmp_path, points(1)) >= 3
    assert same(tmp_path / "killed", tmp_path / "whole")
    assert load_run(tmp_path / "killed").status["status"] == "finished"


def test_killed_before_it_has_begun_it_begins_again(train, tmp_path):
    """At each of the operations around the writing of config.yaml, in the same directory."""
    assert train("whole") == 0
    for last in range(5, 10):
        code = in_child(lambda last=last: (Operations(tmp_path / "killed", last), train("killed")))
        assert code == -signal.SIGKILL, last
    assert train("killed") == 0
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_a_lost_moment_is_caught(train, tmp_path, monkeypatch):
    """The control: one death, and a resume that forgets the first moments."""
    assert train("whole") == 0
    assert in_child(lambda: (Operations(tmp_path / "killed", 260), train("killed"))) == -signal.SIGKILL
    load = ckpt._load_tensors
    monkeypatch.setattr(
        ckpt, "_load_tensors", lambda p: {k: t * 0 if k.startswith("exp_avg/") else t for k, t in load(p).items()}
    )
    assert train("killed") == 0
    assert load_run(tmp_path / "killed").status["started_from_step"] > 0
    assert not same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_finished_run_whose_end_went_bad_is_mended(train, tmp_path, damage):
    """From the checkpoint before it. One that a user removed, to save room, is not missed."""
    assert train("run", **{"train.keep_checkpoints": 2}) == 0
    before = record(tmp_path / "run")
    last = load_run(tmp_path / "run").checkpoints[-1][1]
    if damage == "flip":
        weights = bytearray((last / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (last / "model.safetensors").write_bytes(weights)
    else:
        shutil.rmtree(last)
    assert train("run", **{"train.keep_checkpoints": 2}) == 0
    assert load_run(tmp_path / "run").status["started_from_step"] == (6 if damage == "flip" else 0)
    assert (record(tmp_path / "run") == before) == (damage == "flip")


# -- a disk that fills up ---------------------------------------------------------------------------------------------


def limited(monkeypatch, owner: type, method: str, when, size: int) -> None:
    """While `method` is called with a first argument that `when` holds for, files may not grow beyond `size`."""
    original = getattr(owner, method)

    def within(self, first, *args):
        if not when(first):
            return original(self, first, *args)
        with file_size_limit(size):
            return original(self, first, *args)

    monkeypatch.setattr(owner, method, within)


def test_a_disk_full_when_a_run_begins_is_said(train, tmp_path):
    """With room again, the same command trains."""
    assert train("before", **{"train.max_steps": 1}) == 0  # the corpus is there
    with file_size_limit(100), pytest.raises(UserError, match="cannot be written: File too large") as caught:
        train("full")
    assert caught.value.exit_code == EXIT_DIRECTORY
    assert not (tmp_path / "full" / "config.yaml").exists()
    assert train("full") == 0


@pytest.mark.filterwarnings("ignore:.*training goes on without")
def test_a_disk_full_for_one_checkpoint_costs_that_one(train, tmp_path, monkeypatch):
    assert train("whole", **{"train.keep_checkpoints": 9}) == 0
    limited(monkeypatch, Trainer, "write_checkpoint", lambda step: step == 4, size=3000)
    assert train("full", **{"train.keep_checkpoints": 9}) == 0
    run = load_run(tmp_path / "full")
    assert [step for step, _ in run.checkpoints] == [2, 6, 8]
    assert run.status["unsaved_checkpoints"] == [4]
    assert run.status["status"] == "finished"
    assert "step-00000004 could not be written: File too large" in run.status["warnings"][0]
    ours, theirs = record(run.directory), record(tmp_path / "whole")
    assert all(ours[name] == theirs[name] for name in ours if name.endswith((".safetensors", ".bin", "metrics.jsonl")))
    assert not list(run.directory.rglob(".*"))


def test_a_last_checkpoint_that_was_not_written_is_made_up_for(train, tmp_path, monkeypatch):
    """The run is not called finished: the same command again trains what was lost."""
    assert train("whole") == 0
    with monkeypatch.context() as patch:
        limited(patch, Trainer, "write_checkpoint", lambda step: step == 8, size=3000)
        assert train("full") == EXIT_DISK
        assert load_run(tmp_path / "full").status["status"] == "unsaved"
    assert train("full") == 0
    assert load_run(tmp_path / "full").status["status"] == "finished"
    assert load_run(tmp_path / "full").status["unsaved_checkpoints"] == []
    assert same(tmp_path / "full", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*training goes on without")
def test_a_disk_full_for_the_record_costs_those_records(train, tmp_path, monkeypatch):
    assert train("whole") == 0
    limited(monkeypatch, RunWriter, "scalars", lambda step: step in (3, 4), size=300)
    limited(monkeypatch, RunWriter, "array", lambda name: name == "probe_attn_entropy", size=60)
    assert train("full") == 0
    run, whole = load_run(tmp_path / "full"), load_run(tmp_path / "whole")
    ours, theirs = record(run.directory), record(whole.directory)
    kept = [row for row in theirs["metrics.jsonl"] if row["step"] not in (3, 4)]
    assert ours.pop("metrics.jsonl") == kept
    lost = len(theirs["metrics.jsonl"]) - len(kept)
    assert run.status["dropped"] == {"metrics.jsonl": lost, "arrays/probe_attn_entropy.bin": 5}
    assert run.status["status"] == "finished"
    assert f"metrics.jsonl: {lost} records could not be written" in run.status["warnings"]
    assert not run.has("probe_attn_entropy")
    assert all(ours[name] == theirs[name] for name in ours if name.endswith((".bin", ".safetensors")))


LONG = {"train.max_steps": 60, "train.checkpoint_every": 10, "train.keep_checkpoints": 9, "log.tensorboard": True}


@pytest.mark.filterwarnings("ignore")
def test_a_real_disk_that_is_full_for_a_while(train, tmp_path, monkeypatch):
    """Everything at once, ENOSPC: checkpoints, metrics, arrays, run.json, TensorBoard; then there is room again."""
    (tmp_path / "full").mkdir()
    original = Trainer.train_step
    ballast = tmp_path / "full" / "ballast"

    def filling(self, step, due):
        if step == 5:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 12)):
                    pass
            assert os.statvfs(ballast).f_bavail == 0
        if step == 45:
            ballast.unlink()
        original(self, step, due)

    def on_a_small_disk():
        if not small_disk(tmp_path / "full", "3m"):
            os._exit(77)
        monkeypatch.setattr(Trainer, "train_step", filling)
        assert train("full", **LONG) == 0
        run = load_run(tmp_path / "full")
        assert run.status["status"] == "finished"
        assert [step for step, _ in run.checkpoints] == [50, 60]
        assert run.status["unsaved_checkpoints"] == [10, 20, 30, 40]
        ours = record(run.directory)
        lost = [row for row in wanted["metrics.jsonl"] if row not in ours["metrics.jsonl"]]
        assert len(lost) == run.status["dropped"]["metrics.jsonl"] > 5
        assert all(5 < row["step"] < 50 for row in lost)
        assert all(ours[name] == wanted[name] for name in ours if name.endswith(".safetensors"))

    assert train("whole", **LONG) == 0
    wanted = record(tmp_path / "whole")
    code = in_child(on_a_small_disk)
    if code == 77:
        pytest.skip("mounting is not allowed here")
    assert code == 0

"""The run directory: what is written is what is read, also after a kill in mid-write."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from normfree.config import Config
from normfree.errors import UserError
from normfree.records import RunWriter, truncate
from normfree.runs import Run, expand, load_run, load_runs, norm_label


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "run"
    writer = RunWriter(folder)
    writer.config(Config(name="mine"))
    writer.status(status="finished", value=float("nan"))
    for step in range(5):
        writer.scalars(step, {"train/loss": float(step), "odd": math.inf if step == 3 else math.nan})
        writer.array("attn_entropy", step, np.full((2, 3), step, np.float32), ("layer", "head"), "nats")
    writer.close()
    return folder


def test_round_trip(written):
    run = load_run(written)
    assert run.name == "mine"
    assert run.config == Config(name="mine")
    assert math.isnan(run.status["value"])
    assert run.metrics["train/loss"].tolist() == [0, 1, 2, 3, 4]
    assert run.metrics["odd"].iloc[3] == math.inf
    assert run.entropy.dtype == np.float32
    assert (run.entropy == np.arange(5)[:, None, None]).all()
    assert run.entropy_steps.tolist() == list(range(5))
    assert run.info("attn_entropy").axes == ("layer", "head")


def test_json_is_strict(written):
    for path in (written / "run.json", written / "metrics.jsonl"):
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(text, parse_constant=pytest.fail)
    assert '"Infinity"' in (written / "metrics.jsonl").read_text()


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_tail_is_left_out(written, cut):
    for path in (written / "metrics.jsonl", written / "arrays" / "attn_entropy.bin"):
        path.write_bytes(path.read_bytes()[:-cut])
    run = load_run(written)
    assert run.metrics["train/loss"].tolist() == [0, 1, 2, 3]
    assert (run.entropy == run.entropy_steps[:, None, None]).all()
    assert len(run.entropy) in (3, 4)


def test_truncate_drops_a_step_and_what_follows(written):
    truncate(written, 3)
    run = load_run(written)
    assert run.entropy_steps.tolist() == run.metrics["step"].tolist() == [0, 1, 2]


def test_an_array_keeps_its_shape(tmp_path):
    writer = RunWriter(tmp_path / "run")
    writer.array("x", 0, np.zeros(2), ("layer",), "")
    with pytest.raises(UserError, match="changed"):
        writer.array("x", 1, np.zeros(3), ("layer",), "")
    writer.close()
    with pytest.raises(UserError, match="changed"):  # nor in the process that resumes
        RunWriter(tmp_path / "run").array("x", 1, np.zeros(3), ("layer",), "")


def test_rows_of_one_step_are_merged(tmp_path):
    writer = RunWriter(tmp_path / "run")
    writer.config(Config())
    writer.scalars(1, {"val/loss": 2.0})
    writer.scalars(1, {"train/loss": 3.0})
    assert load_run(tmp_path / "run").metrics.to_dict("records") == [{"step": 1, "val/loss": 2.0, "train/loss": 3.0}]


def test_a_recorded_nan_is_told_from_none(tmp_path):
    writer = RunWriter(tmp_path / "run")
    writer.scalars(0, {"val/loss": math.nan})
    writer.scalars(1, {"train/loss": 3.0})
    steps, values = Run(tmp_path / "run").series("val/loss")
    assert steps.tolist() == [0]
    assert math.isnan(values[0])


def test_exports(written, tmp_path):
    run = load_run(written)
    run.to_npz(tmp_path / "run.npz")
    run.to_csv(tmp_path / "run.csv")
    loaded = np.load(tmp_path / "run.npz")
    assert (loaded["attn_entropy"] == run.entropy).all()
    assert (loaded["attn_entropy_steps"] == run.entropy_steps).all()
    assert (tmp_path / "run.csv").read_text().startswith("step,")


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="has no array 'nan_count'"):
        RunWriter(tmp_path / "r").config(Config()) or load_run(tmp_path / "r").array("nan_count")


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("nosuch", "it does not exist."),
        ("notea", "it does not exist; near it is {}/note."),
        ("zzz*", "nothing matches it."),
        ("note", "it is a file."),
        ("empty", "it has no config.yaml, and holds no directory that has one."),
    ],
)
def test_why_something_is_no_run(tmp_path, typed, reason):
    (tmp_path / "note").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        expand([tmp_path / typed])
    assert f"{tmp_path / typed} is no run directory: {reason.format(tmp_path)}" in str(caught.value)


def test_a_folder_stands_for_its_runs(written, tmp_path):
    assert [run.directory for run in expand([tmp_path])] == [written]
    assert len(load_runs(tmp_path)) == 5


def test_the_label_says_what_norm_free_means():
    config = Config()
    config.model.norm = "none"
    assert norm_label(config) == "no block norms, final norm kept"
    config.model.final_norm = "none"
    assert norm_label(config) == "no block norms, no final norm"


def test_reading_a_run_imports_no_torch(written):
    code = (
        f"import sys; from normfree import load_run; load_run({str(written)!r}).metrics; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

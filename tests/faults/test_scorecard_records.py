"""Records: what was written whole is read back, whatever tail it has; a full disk costs the records it refused."""

import errno
import json
import math
import os
import struct

import numpy as np
import pytest
from crashes import file_size_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normfree.errors import UserError
from normfree.records import MAX_STEP, RunWriter, read_lines, read_records, truncate
from normfree.runs import Run

STEPS = 5
RECORD = 8 + 6 * 4  # bytes of one record of the array below
QUIET = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
junk = st.binary(max_size=200) | st.text(max_size=40).map(str.encode) | st.integers(0, 200).map(bytes)


def value(step: int) -> np.ndarray:
    return np.full((2, 3), step, np.float32)


def write(writer: RunWriter, steps) -> None:
    for step in steps:
        writer.scalars(step, {"train/loss": float(step) if step != 3 else math.nan})
        writer.array("x", step, value(step), ("layer", "head"), "nats")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "run"
    writer = RunWriter(folder)
    writer.status(status="running")
    write(writer, range(STEPS))
    writer.close()
    return folder


@pytest.fixture
def files(written):
    """(metrics.jsonl, arrays/x.bin), put back after the test."""
    paths = (written / "metrics.jsonl", written / "arrays" / "x.bin")
    before = [path.read_bytes() for path in paths]
    yield paths
    for path, data in zip(paths, before, strict=True):
        path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(written):
    return (written / "metrics.jsonl").read_bytes(), (written / "arrays" / "x.bin").read_bytes()


@QUIET
@given(cut=st.floats(0, 1), tail=junk)
def test_metrics_with_any_tail(files, whole, cut, tail):
    data = whole[0][: round(cut * len(whole[0]))]
    files[0].write_bytes(data + tail)
    rows = read_lines(files[0])
    complete = data.count(b"\n")
    assert rows[:complete] == [json.loads(line) for line in whole[0].splitlines()[:complete]]
    assert all(type(row["step"]) is int for row in rows)


@QUIET
@given(cut=st.floats(0, 1), tail=junk)
def test_arrays_with_any_tail(files, whole, cut, tail):
    data = whole[1][: round(cut * len(whole[1]))]
    files[1].write_bytes(data + tail)
    records = read_records(files[1])
    complete = len(data) // RECORD
    assert records[:complete].tobytes() == whole[1][: complete * RECORD]
    steps = [-1, *records["step"].tolist()]
    assert all(one < other < MAX_STEP for one, other in zip(steps, steps[1:], strict=False))
    if tail == bytes(len(tail)) and len(data) == complete * RECORD and complete:
        assert len(records) == complete, "zeros are no record"


@QUIET
@given(cut=st.floats(0, 1), tail=junk, step=st.integers(0, STEPS))
def test_going_on_over_any_tail_ends_with_the_same_bytes(written, files, whole, cut, tail, step):
    """Cut off at the step of a checkpoint and written again, a record does not show that it was ever torn."""
    for path, data in zip(files, whole, strict=True):
        lines = data.splitlines(keepends=True) if path.suffix == ".jsonl" else []
        least = sum(map(len, lines[:step])) if lines else step * RECORD  # what was whole at the checkpoint
        path.write_bytes(data[: max(least, round(cut * len(data)))] + b"\xff" + tail)
    truncate(written, step)
    writer = RunWriter(written)
    write(writer, range(step, STEPS))
    writer.close()
    assert tuple(path.read_bytes() for path in files) == whole


def test_a_line_gone_bad_costs_itself(files, written):
    lines = files[0].read_bytes().splitlines(keepends=True)
    files[0].write_bytes(b"".join([*lines[:2], b"\0" * 20 + b"\n", b'{"step": "2"}\n', *lines[3:]]))
    assert [row["step"] for row in read_lines(files[0])] == [0, 1, 3, 4]
    truncate(written, 4)
    assert files[0].read_bytes() == b"".join([*lines[:2], lines[3]])


def test_a_reader_that_believes_the_file_is_caught(files, whole):
    """The control: np.fromfile and json over all lines do not survive the tails above."""
    files[1].write_bytes(whole[1] + bytes(2 * RECORD))
    assert len(np.fromfile(files[1], read_records(files[1]).dtype)) == STEPS + 2
    assert len(read_records(files[1])) == STEPS
    files[0].write_bytes(whole[0] + b'{"step": 5, "train/l')
    with pytest.raises(ValueError):
        [json.loads(line) for line in files[0].read_bytes().splitlines()]
    assert len(read_lines(files[0])) == STEPS


# -- a disk that takes no more ----------------------------------------------------------------------------------------


def test_a_full_disk_costs_only_the_records_it_refused(tmp_path):
    """Part of each record is written before the disk says no: later ones must not follow the torn one."""
    writer = RunWriter(tmp_path, keep_going=True)
    writer.status(status="running", command="python run.py " + "act=relu " * 20)
    write(writer, [0, 1])
    with file_size_limit(2 * RECORD + 5):
        # The limit is within record 2 of the array; metrics.jsonl and run.json are beyond it.
        with pytest.warns(UserWarning, match="File too large"):
            write(writer, [2, 3])
        assert (tmp_path / "arrays" / "x.bin").stat().st_size == 2 * RECORD + 5, "the record was torn"
        assert len(read_records(tmp_path / "arrays" / "x.bin")) == 2
    assert "dropped" not in Run(tmp_path).status
    write(writer, [4])
    assert Run(tmp_path).status["dropped"] == {"metrics.jsonl": 2, "arrays/x.bin": 2}
    writer.close()
    assert Run(tmp_path).metrics["step"].tolist() == [0, 1, 4]
    steps, values = Run(tmp_path).array("x")
    assert steps.tolist() == [0, 1, 4]
    assert (values == steps[:, None, None]).all()
    assert writer.losses() == [
        "arrays/x.bin: 2 records could not be written",
        "metrics.jsonl: 2 records could not be written",
    ]
    assert not list(tmp_path.rglob(".*"))


def test_a_writer_that_goes_on_after_a_torn_record_is_caught(tmp_path):
    """The control: a plain append, as it was."""
    with open(tmp_path / "x", "ab", buffering=0) as file:
        for step in range(4):
            with file_size_limit(10 if step == 1 else 1000):
                try:
                    file.write(struct.pack("<q", step))
                except OSError:
                    continue
    data = (tmp_path / "x").read_bytes()
    assert np.frombuffer(data[: len(data) // 8 * 8], "<i8").tolist() != [0, 2, 3]


def test_a_device_that_is_always_full(tmp_path):
    (tmp_path / "arrays").mkdir()
    writer = RunWriter(tmp_path, keep_going=True)
    writer.array("x", 0, value(0), ("layer", "head"), "nats")
    writer.close()
    (tmp_path / "arrays" / "x.bin").unlink()
    (tmp_path / "arrays" / "x.bin").symlink_to("/dev/full")
    writer = RunWriter(tmp_path, keep_going=True)
    with pytest.warns(UserWarning, match="No space left on device"):
        writer.array("x", 1, value(1), ("layer", "head"), "nats")
    writer.scalars(1, {"train/loss": 1.0})
    assert Run(tmp_path).status["dropped"] == {"arrays/x.bin": 1}
    writer.array("x", 2, value(2), ("layer", "head"), "nats")  # a file without a record was begun anew
    assert Run(tmp_path).array("x")[0].tolist() == [2]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_run_json_is_written_when_it_can_be_again(tmp_path, monkeypatch, fault):
    writer = RunWriter(tmp_path, keep_going=True)
    writer.status(status="running", a=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(fault, os.strerror(fault))))
        with pytest.warns(UserWarning, match=os.strerror(fault)):
            writer.status(a=2)
        writer.event({"step": 3})
        writer.scalars(0, {})
        assert writer.losses() == [f"run.json is not up to date: {os.strerror(fault)}"]
    assert Run(tmp_path).status == {"status": "running", "a": 1}
    writer.scalars(1, {})
    assert Run(tmp_path).status == {"status": "running", "a": 2, "events": [{"step": 3}]}
    assert writer.losses() == []


def test_a_full_disk_is_an_error_where_nobody_said_to_go_on(tmp_path):
    """An evaluation, which has nothing but its record."""
    writer = RunWriter(tmp_path)
    with file_size_limit(5):
        for work in (lambda: write(writer, [0]), lambda: writer.status(a=1)):
            with pytest.raises(OSError, match="File too large"):
                work()


def test_what_was_lost_before_stays_counted(tmp_path):
    RunWriter(tmp_path).status(dropped={"metrics.jsonl": 3})
    writer = RunWriter(tmp_path, keep_going=True)
    with file_size_limit(5), pytest.warns(UserWarning, match="File too large"):
        writer.scalars(0, {})
    writer.close()
    assert Run(tmp_path).status["dropped"] == {"metrics.jsonl": 4}


def test_a_writer_taken_back_goes_on_counting(tmp_path):
    writer = RunWriter(tmp_path, keep_going=True)
    write(writer, range(4))
    with file_size_limit(5), pytest.warns(UserWarning, match="File too large"):
        writer.scalars(4, {})
    RunWriter(tmp_path).event({"step": 1})  # another writer of run.json loses nothing to this one
    writer.rewind(2)
    writer.status(status="running")
    write(writer, [2])
    assert Run(tmp_path).array("x")[0].tolist() == Run(tmp_path).metrics["step"].tolist() == [0, 1, 2]
    assert Run(tmp_path).status == {"events": [{"step": 1}], "status": "running", "dropped": {"metrics.jsonl": 1}}


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    RunWriter(tmp_path).status(status="running")
    for name in (".run.json.123", ".config.yaml.9", "arrays/.x.json.7"):
        (tmp_path / name).write_text("half")
    RunWriter(tmp_path)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
def test_damaged_files_are_named(tmp_path, text):
    writer = RunWriter(tmp_path)
    write(writer, [0])
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        RunWriter(tmp_path)
    (tmp_path / "arrays" / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json cannot be read"):
        read_records(tmp_path / "arrays" / "x.bin")

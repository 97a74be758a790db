"""How experiments/relu_revival.py runs its cells: in which order, on which device, within a budget, and what fails."""

import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fixtures.make_results  # noqa: F401  it puts experiments/ where imports find it
import pytest
from revival import pace, process, rungs, study
from revival import records as store
from revival import run as running
from revival.cells import TUNING_SEED, Cell
from revival.place import Place

PYTHIA = rungs.base("gelu")


def session(tmp_path: Path, scale: str = "short", **more: Any) -> running.Session:
    options = running.Options(scale, Place((), "f00d"), tmp_path, tmp_path, False, (1,), **more)
    return running.Session(options)


# -- the budget --------------------------------------------------------------------------------------------------------


def taken(cell: Cell, seconds: float, **more: Any) -> dict[str, Any]:
    made_of = {"rung": cell.rung, "tuning": cell.tuning, "planned_tokens": cell.recipe.tokens, "device": "H200"}
    made_of |= {"workers": 1, "steps": 800, "last_step": 800}
    return made_of | {"status": "finished", "seconds": seconds} | more


def test_no_cell_begins_that_would_pass_the_budget(tmp_path: Path) -> None:
    found = session(tmp_path, "smoke", seconds=20, together=100)
    assert len(found.ready()) == 2  # nine seconds each
    found.pace.learn(rungs.smoke_cells()[0], taken(rungs.smoke_cells()[0], 2.25))  # they turn out to be faster
    assert len(found.ready()) == 4
    late = session(tmp_path, "smoke", seconds=20, together=100, began=time.monotonic() - 10)
    assert len(late.ready()) == 1  # preparing the text took half of it


def test_expected_times_are_corrected_by_comparable_cells_only() -> None:
    tuning, reported, gpt2 = PYTHIA.cell(1e-3, TUNING_SEED), PYTHIA.cell(1e-3, 1), next(rungs.short_c(EMPTY))
    assert isinstance(gpt2, Cell)
    found, expected = pace.Pace(), reported.recipe.seconds
    found.learn(reported, taken(reported, 5.0, status="lost", last_step=300))
    assert found.predicted(reported) == expected  # a run that ended early says nothing
    found.learn(tuning, taken(tuning, expected / 2 - 10, status="lost"), 10)  # its process took 10 more
    assert found.predicted(tuning) == expected / 2
    assert (found.predicted(reported), found.predicted(gpt2)) == (expected, gpt2.recipe.seconds)
    found.learn(reported, taken(reported, 2 * expected))
    assert found.predicted(replace(reported, rung="B")) == 2 * expected
    assert found.predicted(gpt2) == 1.25 * gpt2.recipe.seconds  # the middle of all, where that is slower


def test_expected_times_begin_with_what_this_device_took_before() -> None:
    cell = PYTHIA.cell(1e-3, 1)
    found = pace.Pace()
    found.recall([taken(cell, 300), taken(cell, 500), taken(cell, 900), taken(cell, 9, last_step=99)], "H200")
    assert found.predicted(cell) == 500
    assert found.predicted(PYTHIA.cell(1e-3, TUNING_SEED)) == cell.recipe.seconds
    other = pace.Pace()
    other.recall([taken(cell, 500)], "A100")
    other.recall([taken(cell, 500, workers=3)], "H200")
    other.recall([taken(cell, 1)], "H200")
    assert other.predicted(cell) == cell.recipe.seconds  # the first may have to compile


@pytest.mark.parametrize(("printed", "name"), [("H200\nH200\n", "H200"), ("H200\nT4\n", None), (None, None)])
def test_the_device_is_named_as_records_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str | None, name: str | None
) -> None:
    if printed is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{printed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pace.device_name(("0", "1")) == name
    assert pace.device_name(())


def test_cells_that_share_a_gpu_wait_for_each_other_s_steps() -> None:
    """Not for start and evaluation, which leave most of it idle: a long cell is slowed down more than a short one."""
    cell, gpt2 = PYTHIA.cell(1e-3, 1), next(rungs.short_c(EMPTY))
    assert isinstance(gpt2, Cell)
    found = pace.Pace(workers=3)
    assert found.predicted(cell) == pytest.approx(3 * 800 * 0.045 + 45)
    found.learn(cell, taken(cell, 100, workers=3))
    assert found.predicted(cell) == pytest.approx(100)
    assert found.predicted(gpt2) == pytest.approx(3 * 3226 * 0.095 + 90)
    assert running.Options("short", Place((), "f00d"), Path(), Path(), False, (1,), gpus=tuple("00111")).workers == 3


EMPTY = study.Results([], "f00d", (1,))


# -- order and place ---------------------------------------------------------------------------------------------------


def test_later_rungs_are_held_back_while_rates_of_earlier_ones_may_be_settled(tmp_path: Path) -> None:
    """An idle GPU waits a minute for the rates of rung A, not seven for a cell of rung C."""
    found = session(tmp_path, together=1000)
    rates = [cell for cell in found.ready() if cell.rung == "A"]
    assert all(cell.tuning for cell in rates)
    found.failed |= {cell.name for cell in rates[1:]}
    assert found.ready()[0] == rates[0]
    found.running[rates[0].name] = rates[0]
    assert found.ready() == []
    del found.running[rates[0].name]
    found.failed.add(rates[0].name)  # nothing that is under way could settle a rate
    assert found.ready()[0].rung == "C"
    found.running[found.ready()[0].name] = found.ready()[0]
    assert found.ready()[0].rung == "C"


def test_a_process_without_a_gpu_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert process.environment("1")["CUDA_VISIBLE_DEVICES"] == "1"
    assert process.environment(None)["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


# -- processes ---------------------------------------------------------------------------------------------------------


CHILD = """
import json, sys
tasks = json.load(open(sys.argv[1]))
for task in tasks["cells"]:
    if task["arm"] == sys.argv[0].rpartition("_")[2]:
        sys.exit("out of memory")
    record = {name: task[name] for name in ("key", "name", "rung", "arm", "lr", "seed", "tuning")}
    assert tasks["workers"] == 1
    record |= {"status": "finished", "lost": None, "val_loss": 2.5, "seconds": 1.0}
    record |= {"steps": 20, "last_step": 20}
    with open(f"{tasks['out']}/smoke/A.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
"""


def test_a_cell_that_fails_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers, a process a cell, of which that of GELU fails; the next call trains only what is missing."""
    out, runs = tmp_path / "out", tmp_path / "runs"
    (out / "smoke").mkdir(parents=True)
    runs.mkdir()
    options = running.Options("smoke", Place((), "f00d"), out, runs, False, (1,), gpus=("0", "1"))
    for name, code, n in (("child_gelu", 1, 3), ("child_none", 0, 4)):
        monkeypatch.setattr(process, "CHILD", (sys.executable, str(tmp_path / name)))
        (tmp_path / name).write_text(CHILD)
        assert running.run(options) == code
        printed = capsys.readouterr().out
        assert ("A/gelu/lr5e-3/s1: failed with exit code 1" in printed) == bool(code)
        assert ("out of memory" in printed) == bool(code)
        assert len(store.read(out, "smoke")) == n
    assert not list(runs.iterdir())
    other = tmp_path / "other"
    assert list(store.merge(out, other).values()) == [4]
    assert list(store.merge(out, other).values()) == [0]
    elsewhere = running.Options("smoke", Place((), "f00d"), tmp_path / "new", runs, False, (1,), known=(other,))
    assert running.Session(elsewhere).ready() == []


def test_a_cell_that_fails_takes_none_along_that_its_process_never_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs"
    (out / "smoke").mkdir(parents=True)
    runs.mkdir()
    (tmp_path / "child_ln+relu").write_text(CHILD)  # the second of four
    monkeypatch.setattr(process, "CHILD", (sys.executable, str(tmp_path / "child_ln+relu")))
    assert running.run(running.Options("smoke", Place((), "f00d"), out, runs, False, (1,), together=100)) == 1
    assert [record["arm"] for record in store.read(out, "smoke")] == ["ln+gelu", "gelu", "relu"]
    assert "3 cells in 0.0 minutes; 1 failed" in capsys.readouterr().out
    (tmp_path / "child_all").write_text("raise SystemExit('no kernel image is available')")
    monkeypatch.setattr(process, "CHILD", (sys.executable, str(tmp_path / "child_all")))
    assert running.run(running.Options("smoke", Place((), "f00d"), tmp_path / "new", runs, False, (1, 2))) == 1
    printed = capsys.readouterr().out
    assert "given up: the last 3 processes failed\n0 cells in 0.0 minutes; 3 failed" in printed  # of eight


def test_a_process_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "smoke").mkdir(parents=True)
    hangs = "if task['arm'] == 'gelu': import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    (tmp_path / "child").write_text(CHILD.replace("    record = {", f"    {hangs}\n    record = {{"))
    monkeypatch.setattr(process, "CHILD", (sys.executable, str(tmp_path / "child")))
    monkeypatch.setattr(process, "GRACE", 0.1)
    for name in ("HANGS", "UNTRIED"):
        monkeypatch.setattr(running, name, (0, 3.0))  # a busy machine takes one to start Python
    assert running.run(running.Options("smoke", Place((), "f00d"), tmp_path / "out", tmp_path, False, (1,))) == 1
    assert [record["arm"] for record in store.read(tmp_path / "out", "smoke")] == ["ln+gelu", "ln+relu", "relu"]
    printed = capsys.readouterr().out
    assert "A/gelu/lr5e-3/s1: ended, as it may take 3 s at most: failed with exit code -9" in printed
    assert re.search(r"3 cells in 0\.\d minutes; 1 failed; results: ", printed)


def test_how_long_a_process_may_take(tmp_path: Path) -> None:
    cell = PYTHIA.cell(1e-3, 1)
    assert session(tmp_path).limit([cell]) == float("inf")  # on a CPU nobody knows
    found = session(tmp_path, gpus=("0",))
    assert found.limit([cell]) == 3600
    found.pace.learn(cell, taken(cell, 200))
    assert found.limit([cell]) == pytest.approx(1000)
    assert session(tmp_path, gpus=("0",), seconds=100).limit([cell]) == pytest.approx(220, abs=1)


def test_a_call_that_begins_nothing_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "short"
    options = running.Options("short", Place((), "f00d"), tmp_path, tmp_path, False, (1,), patterns=("E/global*",))
    assert running.run(options) == 0
    assert "0 cells are done, none can be begun\nlater: 6 cells of rung E" in capsys.readouterr().out
    assert running.run(replace(options, patterns=(), seconds=1)) == 0
    assert "no cell fits into the budget; the next is A/ln+gelu/lr2.5e-4/s101" in capsys.readouterr().out
    assert not known.exists()


def test_a_machine_that_is_taken_away_costs_the_cells_under_way_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """timeout(1) and batch systems send SIGTERM, perhaps twice: no process is left behind, and what is done is kept."""
    before = signal.getsignal(signal.SIGTERM)
    parent = os.getpid()
    ends = f"if task['arm'] == 'ln+relu': import os, time; os.kill({parent}, 15); os.kill({parent}, 15); time.sleep(60)"
    (tmp_path / "child").write_text(CHILD.replace("    record = {", f"    {ends}\n    record = {{"))
    (tmp_path / "out" / "smoke").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(process, "CHILD", (sys.executable, str(tmp_path / "child")))
    options = running.Options("smoke", Place((), "f00d"), tmp_path / "out", tmp_path / "runs", False, (1,))
    assert running.run(options) == 128 + signal.SIGTERM
    assert [record["arm"] for record in store.read(tmp_path / "out", "smoke")] == ["ln+gelu"]
    assert "interrupted; 1 cells are done and kept" in capsys.readouterr().out
    assert not list((tmp_path / "runs").iterdir())
    assert signal.getsignal(signal.SIGTERM) == before

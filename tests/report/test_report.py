"""The page as a file: its numbers are `load_run`'s, its words are harmless, and mistakes are named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.make_runs import make_run
from many_runs import HOSTILE, make_full_run

from normfree.errors import EXIT_CONFIG, EXIT_DIRECTORY, UserError
from normfree.heads import entropy_ceiling, is_overloaded
from normfree.records import RunWriter
from normfree.report import build
from normfree.report.__main__ import main
from normfree.report.data import run_data, seq_len
from normfree.report.packing import unpack
from normfree.report.tables import settings
from normfree.runs import Run, expand, load_run


def embedded(page: str) -> list[dict[str, Any]]:
    """The runs of the data block, which is strict JSON."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert text
    return json.loads(text[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["runs"]


@pytest.fixture(scope="session")
def page(runs: list[Run]) -> str:
    return build(runs)


# --------------------------------------------------------------------------------------------------------- numbers


def test_entropy_counts_and_curves_are_those_of_the_record(runs: list[Run], page: str) -> None:
    for run, data in zip(runs, embedded(page), strict=True):
        for source, name in (("train", "attn_entropy"), ("probe", "probe_attn_entropy")):
            steps, values = run.array(name)
            np.testing.assert_array_equal(unpack(data["entropy"][source]["steps"]), steps)
            assert unpack(data["entropy"][source]["values"]).tobytes() == values.tobytes()
        np.testing.assert_array_equal(unpack(data["counts"]["nan"]), run.array("nan_count")[1])
        np.testing.assert_array_equal(unpack(data["counts"]["inf"]), run.array("inf_count")[1])
        for name in ("train/loss", "val/loss", "lr", "grad_norm"):
            np.testing.assert_array_equal(unpack(data["scalars"][name]["values"]), run.series(name)[1])
        assert data["ceiling"] == entropy_ceiling(seq_len(run))


def test_statistics_of_heads_are_reduced_over_those_that_are_not_nan(tmp_path: Path) -> None:
    run = make_full_run(tmp_path / "run", n=5)
    data = run_data(run, "run")["layers"]
    np.testing.assert_array_equal(unpack(data["resid_rms"]["values"]), run.array("resid_rms")[1])
    np.testing.assert_array_equal(unpack(data["max_score"]["values"]), run.array("max_score")[1].max(axis=-1))
    mean = run.array("sink_mass")[1].astype(np.float64).mean(axis=-1)
    np.testing.assert_array_equal(unpack(data["sink_mass"]["values"]), mean.astype(np.float32))
    assert "attn_entropy" not in data


def test_the_first_bad_place_is_the_lowest_layer_and_there_what_is_computed_first(runs: list[Run]) -> None:
    data = run_data(runs[1], "lost")
    assert data["first"]["nan"] == {"step": 200, "layer": 3, "site": "mlp_hidden", "count": 12}
    assert data["first"]["both"] == data["first"]["nan"] | {"count": 12 + 4}
    assert data["fault"]["layer"] == 3
    assert run_data(runs[0], "clean")["first"] == {}


def test_the_table_says_what_the_record_says(runs: list[Run], page: str) -> None:
    row = re.search(r'<tr data-run="0">.*?</tr>', page, re.S)
    assert row
    cells = re.findall(r"<td>(.*?)</td>", row[0])
    losses = runs[0].series("val/loss")[1]
    share = is_overloaded(runs[0].probe_entropy[-1], 128).mean()
    assert f"{losses[-1]:.4f}" in cells
    assert f"{100 * share:.0f} %" in cells
    assert "0 of 48" in cells


def test_long_runs_are_thinned_and_counted(tmp_path: Path) -> None:
    run = make_full_run(tmp_path / "run", n=700, n_layer=2, n_head=2, fault_at=333, points=5000)
    data = run_data(run, "run")
    steps = unpack(data["entropy"]["probe"]["steps"])
    assert len(steps) <= 300
    assert data["entropy"]["probe"]["of"] == 700
    assert {0, 3320, 3330, 6990} <= set(steps)
    kept = np.isin(run.probe_entropy_steps, steps)
    assert unpack(data["entropy"]["probe"]["values"]).tobytes() == run.probe_entropy[kept].tobytes()
    assert data["scalars"]["train/loss"]["of"] == 5000
    assert len(unpack(data["scalars"]["train/loss"]["steps"])) <= 2003


def test_twenty_runs_stay_below_ten_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(20):
        bad = 150 if i % 5 == 4 else None
        make_full_run(tmp_path / f"runs/{i:02}", n=300, n_layer=12, n_head=12, seed=i, fault_at=bad, points=1500)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size < 10e6
    assert re.search(r"wrote .*report.html \(\d\.\d MB, 20 runs\)", capsys.readouterr().out)


def test_settings_that_differ_stand_first(runs: list[Run]) -> None:
    differing, equal = settings(runs[:2])
    assert {s.key: s.values for s in differing} == {"seed": ["1", "2"], "optim.lr": ["0.003", "0.01"]}
    assert "name" not in {s.key for s in differing + equal}
    assert next(s for s in equal if s.key == "model.n_inner").values[0] == "256"
    assert all(s.help for s in differing + equal)


# --------------------------------------------------------------------------------------------------- absent things


def test_a_run_without_any_record_has_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "empty", steps=())
    data = embedded(build([load_run(tmp_path / "empty")]))[0]
    assert data["entropy"] == {}
    assert data["counts"] is None
    assert data["snapshots"] is None
    assert data["layers"] == {}


def test_an_old_run_with_four_sites_and_no_probe_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old", nan_from=300, lost_from=300, status="diverged", probe=False)
    data = embedded(build([run]))[0]
    assert list(data["entropy"]) == ["train"]
    assert data["first"]["nan"]["layer"] == 3
    assert data["lost"]
    assert "loss is NaN" in build([run])


def test_a_real_run_has_a_page(train_tiny: Any) -> None:
    run = train_tiny()
    data = embedded(build([run]))[0]
    assert unpack(data["entropy"]["probe"]["values"]).tobytes() == run.probe_entropy.tobytes()
    assert data["status"] == "finished"
    assert not data["lost"]


def test_a_run_that_trained_on_with_a_loss_that_is_not_finite_is_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lost_from=300)
    assert run.status["status"] == "finished"
    data = embedded(build([run]))[0]
    assert data["lost"]
    assert data["lost_at"] == 300


def test_a_run_is_lost_at_the_step_of_its_status(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="diverged", steps=(0, 5, 10))
    assert run_data(run, "run")["lost_at"] == 10
    writer = RunWriter(run.directory)
    writer.status(last_step=20)
    assert run_data(load_run(run.directory), "run")["lost_at"] == 20
    writer.status(status="failed", last_step=None)
    assert run_data(load_run(run.directory), "run")["lost_at"] is None
    writer.close()
    assert run_data(make_run(tmp_path / "well", steps=(0,)), "well")["lost_at"] is None


# ----------------------------------------------------------------------------------------------- words, and no more


def test_names_of_runs_cannot_become_markup(page: str) -> None:
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "&lt;/script&gt;&lt;img" in page
    assert [data["label"] for data in embedded(page)][2] == HOSTILE


def test_hostile_words_of_the_record_cannot_become_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name="x", act="relu")
    writer = RunWriter(run.directory)
    fault = {"step": 3, "phase": HOSTILE, "module": HOSTILE, "text": HOSTILE}
    events = [{"step": 2, "kind": HOSTILE, "layer": None, "text": HOSTILE}]
    writer.status(reason=HOSTILE, warnings=[HOSTILE], command=HOSTILE, fault=fault, events=events, status=HOSTILE)
    writer.scalars(600, {HOSTILE: 1.0})
    writer.close()
    page = build([load_run(run.directory)], title=HOSTILE)
    assert "<img" not in page
    assert page.count("</script>") == 2


def test_the_page_asks_for_nothing(page: str) -> None:
    outside_data = re.sub(r'id="data">.*?</script>', "", page, flags=re.S)
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", outside_data) == []
    assert "@import" not in outside_data
    assert "url(" not in outside_data
    assert re.findall(r"\bfetch\(|XMLHttpRequest|WebSocket|innerHTML|insertAdjacentHTML|\beval\(", outside_data) == []
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_reading_and_writing_a_report_imports_neither_torch_nor_matplotlib(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from normfree.report.__main__ import main; "
        f"assert main([{str(folder)!r}, '--out', {str(tmp_path / 'r.html')!r}]) == 0; "
        "assert not {'torch', 'matplotlib', 'hydra', 'plotting'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------------------- mistakes


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err


def test_mistakes_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.html").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        ((tmp_path / "nowhere",), EXIT_DIRECTORY, "nowhere is no run directory"),
        ((folder, "--out", tmp_path / "taken.html"), EXIT_DIRECTORY, "is a directory"),
        ((folder, "--out", tmp_path / "report.pdf"), EXIT_CONFIG, ".html"),
        ((folder, "--out", tmp_path / "file" / "r.html"), EXIT_DIRECTORY, "cannot write"),
    ]
    for arguments, code, words in cases:
        found, err = mistake(capsys, *arguments)
        assert (found, words in err) == (code, True), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.html"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("config.yaml", "novel: 1"),
        ("arrays/elements.json", "{}"),
        ("arrays/act_slope.json", "not json"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, file: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "damaged")
    (run.directory / file).write_text(text)
    code, err = mistake(capsys, run.directory, "--out", tmp_path / "r.html")
    assert code in (EXIT_CONFIG, EXIT_DIRECTORY)
    assert "damaged" in err
    assert not (tmp_path / "r.html").exists()


def test_a_run_named_twice_is_shown_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "a"), str(folder), "--out", str(tmp_path / "r.html")]) == 0
    assert "3 runs" in capsys.readouterr().out
    assert [data["label"] for data in embedded((tmp_path / "r.html").read_text())][0] == "clean"


def test_a_reader_who_closed_the_pipe_is_no_error(folder: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "normfree.report", str(folder), "--out", str(tmp_path / "r.html")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "r.html").is_file()


def test_the_same_runs_make_the_same_page(folder: Path, page: str) -> None:
    assert build(expand([folder])) == page


def test_a_report_needs_a_run() -> None:
    with pytest.raises(UserError, match="at least one"):
        build([])

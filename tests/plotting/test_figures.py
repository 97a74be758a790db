"""What holds for every figure: it is drawn for any shape, has its width, clips nothing, and writes its numbers."""

import csv
import math
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib
import matplotlib.text
import pytest
from drawing import command, draw
from fixtures.make_runs import make_run

import plotting
from normfree.errors import EXIT_CONFIG, EXIT_DIRECTORY, EXIT_OK
from normfree.runs import Run
from plotting import common

ENTROPY = ("entropy_heatmap", "layerwise_entropy", "entropy_ranges")
ARRAYS = (*ENTROPY, "nan_counts", "learned_slopes")
ALL = (*ARRAYS, "loss_curves")


def assert_nothing_clipped(fig: common.Figure) -> None:
    with matplotlib.rc_context(common.STYLE):
        common.make_room(fig)
    box, (width, height) = fig.get_tightbbox(), fig.get_size_inches()
    slack = 0.03
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -slack, (box, width, height)


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize(
    ("names", "width"),
    [
        (["nan-1x1"], 3.25),
        (["6x8"], 3.25),
        (["nan-24x16", "nan-6x8", "24x16"], 6.75),
    ],
)
def test_any_shape_has_its_width_and_clips_nothing(
    runs: dict[str, Run], script: str, names: list[str], width: float
) -> None:
    fig, rows = draw(script, [runs[name] for name in names], width)
    assert fig.get_figwidth() == width
    assert_nothing_clipped(fig)
    assert rows
    sizes = {t.get_fontsize() for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()}
    assert min(sizes) >= 7
    assert max(sizes) <= 9


@pytest.mark.parametrize("script", ARRAYS)
def test_data_equals_the_record(
    runs: dict[str, Run], script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["nan-6x8"]
    out, data = tmp_path / f"{script}.svg", tmp_path / "numbers.csv"
    assert command(script, run.directory, "--out", out, "--data", data) == EXIT_OK
    assert capsys.readouterr().out.split() == [str(out), str(data)]
    with data.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if script == "entropy_heatmap":
        found = [float(row["entropy"]) for row in rows]
        assert found == pytest.approx(run.probe_entropy[-1].ravel().tolist(), rel=0, abs=0, nan_ok=True)
    elif script == "layerwise_entropy":
        at = {(int(r["step"]), int(r["layer"])): (float(r["entropy"]), int(r["nan_heads"])) for r in rows}
        assert at[500, 0][0] == pytest.approx(run.probe_entropy[-1, 0].mean(), rel=1e-6)
        assert at[300, 3][1] == 4
        assert math.isnan(at[300, 5][0])
    elif script == "nan_counts":
        assert [int(row["nan_count"]) for row in rows] == run.nan_counts.ravel().tolist()
    elif script == "learned_slopes":
        assert [float(row["slope"]) for row in rows] == run.array("act_slope")[1].ravel().tolist()
    else:
        assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
        assert sum(int(row["heads"]) for row in rows) == 48


@pytest.mark.parametrize("script", ALL)
def test_a_missing_step_names_the_nearest_ones(
    runs: dict[str, Run], script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(script, runs["6x8"].directory, "--step", 120) == EXIT_CONFIG
    message = capsys.readouterr().err
    assert "no record at step 120; nearest: 100 and 1" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("script", ALL)
def test_no_such_run_is_one_message(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(script, tmp_path / "nowhere") == EXIT_DIRECTORY
    assert "is no run directory" in capsys.readouterr().err


@pytest.mark.parametrize("script", ALL)
def test_nothing_recorded_is_one_message(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "empty", steps=())
    assert command(script, run.directory) == EXIT_CONFIG
    assert "nothing recorded" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_one_message(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command("entropy_heatmap", runs["1x1"].directory, "--out", tmp_path / "file" / "x.png") == EXIT_DIRECTORY
    assert "cannot write" in capsys.readouterr().err


def test_an_unknown_format_names_the_known_ones(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("loss_curves", runs["1x1"].directory, "--out", "x.jpeg") == EXIT_CONFIG
    assert ".png, .svg, .pdf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "code", "words"),
    [
        ("--data", "file/x.csv", EXIT_DIRECTORY, "file is no directory"),
        ("--data", "folder.csv", EXIT_DIRECTORY, "it is a directory"),
        ("--data", "x.txt", EXIT_CONFIG, "the ending must be .csv"),
        ("--data", "locked/new/x.csv", EXIT_DIRECTORY, "no permission to write"),
        ("--out", "locked/x.png", EXIT_DIRECTORY, "no permission to write"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(
    runs: dict[str, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    name: str,
    code: int,
    words: str,
) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("folder.csv", "locked"):
        (tmp_path / folder).mkdir()
    may = os.access  # root may write everywhere
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked" and may(path, mode))
    before = sorted(tmp_path.rglob("*"))
    places = {"--out": "aa.png", "--data": "aa.csv"} | {option: name}
    arguments = [part for key, place in places.items() for part in (key, tmp_path / place)]
    assert command("loss_curves", runs["1x1"].directory, *arguments) == code
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_who_closed_the_pipe_is_no_error(runs: dict[str, Run], tmp_path: Path) -> None:
    script = Path(plotting.__file__).with_name("loss_curves.py")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(script), str(runs["1x1"].directory), "--out", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (EXIT_OK, "")
    assert (tmp_path / "x.png").is_file()


def test_pdf_embeds_truetype_and_svg_keeps_text(runs: dict[str, Run], tmp_path: Path) -> None:
    run, pdf, svg = runs["6x8"].directory, tmp_path / "x.pdf", tmp_path / "x.svg"
    assert command("nan_counts", run, "--out", pdf) == command("nan_counts", run, "--out", svg) == EXIT_OK
    raw = b"".join([pdf.read_bytes(), *_streams(pdf.read_bytes())])
    assert b"/FontFile2" in raw
    assert b"/CIDFontType2" in raw
    assert b"/Type3" not in raw
    assert re.search(r"<text[^>]*>clean-6x8</text>", svg.read_text(encoding="utf-8"))


def _streams(pdf: bytes) -> list[bytes]:
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            continue  # a stream that is not compressed is in the file as it stands
    return found


def test_equal_figures_are_equal_files(runs: dict[str, Run], tmp_path: Path) -> None:
    for kind in ("svg", "pdf"):
        first, second = (tmp_path / f"{name}.{kind}" for name in "ab")
        for out in (first, second):
            assert command("entropy_ranges", runs["1x1"].directory, "--out", out) == EXIT_OK
        assert first.read_bytes() == second.read_bytes()


def test_defaults_one_run_keeps_its_figure_and_several_go_where_the_user_stands(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", 1, 1)
    assert command("entropy_heatmap", "run") == EXIT_OK
    assert (run.directory / "figures" / "entropy_heatmap.png").is_file()
    assert command("entropy_heatmap", run.directory, runs["6x8"].directory) == EXIT_OK
    assert (tmp_path / "entropy_heatmap.png").is_file()


def test_a_script_runs_from_anywhere_and_without_torch(runs: dict[str, Run], tmp_path: Path) -> None:
    script = Path(plotting.__file__).with_name("layerwise_entropy.py")
    code = (
        "import runpy, sys; sys.argv[0] = sys.argv.pop(1)\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(script), str(runs["6x8"].directory), "--out", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "x.png\n"
    assert (tmp_path / "x.png").is_file()


def test_draw_all_draws_what_was_recorded(runs: dict[str, Run], tmp_path: Path) -> None:
    drawn = plotting.draw_all(runs["6x8"], tmp_path, formats=("svg",))
    assert drawn == {f"{script}.svg": tmp_path / f"{script}.svg" for script in plotting.SCRIPTS}
    assert all(path.is_file() for path in drawn.values() if isinstance(path, Path))


def test_draw_all_reports_a_failure_and_goes_on(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("plotting.entropy_ranges.plot", fail)
    monkeypatch.setattr(plotting, "SCRIPTS", {"entropy_ranges": (), "learned_slopes": ("absent",), "loss_curves": ()})
    drawn = plotting.draw_all(runs["1x1"], tmp_path)
    assert str(drawn["entropy_ranges.png"]) == "no ink"
    assert drawn["loss_curves.png"] == tmp_path / "loss_curves.png"
    assert set(drawn) == {"entropy_ranges.png", "loss_curves.png"}

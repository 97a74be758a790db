"""The table of runs: closed forms of its numbers, and honesty about lost and unfinished runs."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fixtures.make_runs import make_run

from normfree.errors import EXIT_CONFIG, EXIT_DIRECTORY, EXIT_OK, UserError
from normfree.records import RunWriter
from normfree.runs import expand, load_runs
from plotting.seeds import mean_interval, t_quantile

SCRIPT = Path(__file__).parents[1] / "experiments" / "summarize.py"


@pytest.fixture(scope="module")
def summarize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("summarize", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["summarize"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three seeds with and without norms; of the norm-free ones seed 3 diverged. One run is still training."""
    for seed in (1, 2, 3):
        make_run(tmp_path / "runs" / f"norm-s{seed}", seed=seed, norm="layernorm")
        status = "diverged" if seed == 3 else "finished"
        make_run(tmp_path / "runs" / f"free-s{seed}", seed=seed, status=status, lost_from=300 if seed == 3 else None)
    make_run(tmp_path / "runs" / "other", act="gelu", status="running", steps=(0, 50, 100))
    return tmp_path / "runs"


def test_the_t_interval_has_known_values() -> None:
    known = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 30: 2.0423, 31: 2.0395, 60: 2.0003, 120: 1.9799}
    for degrees, value in known.items():
        assert t_quantile(degrees) == pytest.approx(value, abs=1e-4)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (float(mean), float(half)) == pytest.approx((2.0, 4.3027 / math.sqrt(3)))
    assert math.isnan(mean_interval([1.0])[1])


def test_paired_differences_take_the_seeds_both_finished(summarize: ModuleType, folder: Path) -> None:
    rows, baseline = summarize.summarize(expand([folder]))
    by_name = {row.configuration: row for row in rows}
    assert baseline == "gpt2-nano-layernorm-relu"
    free, norm = by_name["gpt2-nano-none-relu"], by_name[baseline]
    assert set(free.losses) == {1, 2}
    differences = [free.losses[seed] - norm.losses[seed] for seed in (1, 2)]
    mean, spread = sum(differences) / 2, abs(differences[0] - differences[1]) / 2
    assert free.pairs == 2
    assert free.difference == pytest.approx(mean)
    assert free.difference_interval == pytest.approx(12.7062 * spread, abs=1e-9)  # s / sqrt(2) = half the distance
    assert free.difference == pytest.approx(0.25)  # what the fixture adds to norm-free losses
    assert norm.perplexity == pytest.approx(math.exp(sum(norm.losses.values()) / 3))


def test_lost_and_unfinished_runs_are_counted_and_not_averaged(summarize: ModuleType, folder: Path) -> None:
    rows, baseline = summarize.summarize(expand([folder]))
    by_name = {row.configuration: row for row in rows}
    free, other = by_name["gpt2-nano-none-relu"], by_name["gpt2-nano-none-gelu"]
    assert (free.n, free.lost, free.unfinished) == (3, 1, 0)
    assert free.loss == pytest.approx(sum(free.losses.values()) / 2)
    shown = summarize.cells(free, False)
    assert shown["lost"] == "1 of 3"
    assert shown["val loss"].endswith("(2 of 3)")
    assert (other.n, other.lost, other.unfinished, other.loss) == (1, 0, 1, None)
    assert summarize.cells(other, False)["val loss"] == "-"
    assert summarize.cells(by_name[baseline], True)["difference"] == "-"


def test_a_finished_run_without_a_finite_loss_is_lost(summarize: ModuleType, tmp_path: Path) -> None:
    """`nan_policy=log` trains on to the end; the last good loss on the way is no result."""
    run = make_run(tmp_path / "nan", lost_from=300)
    ((row,), _) = summarize.summarize([run])
    assert (row.n, row.lost, row.loss) == (1, 1, None)


def test_a_loss_without_a_perplexity_leaves_the_table_whole(summarize: ModuleType, tmp_path: Path) -> None:
    """exp(710) is no float."""
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["val/loss"] = 2464.98
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summarize.main([str(run.directory), "--out", str(tmp_path / "table.csv")]) == EXIT_OK
    ((row,), _) = summarize.summarize(expand([run.directory]))
    assert (row.loss, row.perplexity) == (2464.98, None)


def test_evaluations_are_no_samples_of_training(
    summarize: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, baseline = summarize.summarize(expand([folder]))
    beside = make_run(folder / "evaluate-of-norm", seed=1, norm="layernorm")  # the settings of a run, and its seed
    RunWriter(beside.directory).status(kind="evaluation")
    assert summarize.summarize(expand([folder])) == (before, baseline)
    assert "evaluate-of-norm: an evaluation, left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="is an evaluation, and so are all that were named"):
        summarize.summarize(expand([beside.directory]))
    assert set(load_runs(str(folder))["kind"]) == {"run", "evaluation"}


def test_plug_ins_of_other_contents_are_no_samples_of_one_configuration(summarize: ModuleType, folder: Path) -> None:
    for seed, digest in ((1, "a"), (2, "a"), (3, "b")):
        RunWriter(folder / f"norm-s{seed}").status(plugins=[{"path": "mine.py", "sha256": digest}])
    with pytest.raises(UserError, match="plug-ins of other contents"):
        summarize.summarize(expand([folder]))


def test_entropy_is_that_of_the_last_record(summarize: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 2)
    ((row,), baseline) = summarize.summarize([run])
    assert baseline is None
    assert row.mean_entropy == pytest.approx(float(run.probe_entropy[-1].mean()), rel=1e-6)
    assert row.overloaded in (0, 25, 50, 75, 100)
    for path in (run.directory / "arrays").iterdir():
        path.unlink()
    ((row,), _) = summarize.summarize(expand([run.directory]))
    assert summarize.cells(row, False)["mean entropy"] == "-"


def test_keys_that_differ_are_columns(summarize: ModuleType, folder: Path) -> None:
    rows, _ = summarize.summarize(expand([folder]))
    assert all(set(row.keys) == {"model.norm", "model.act"} for row in rows)
    assert {row.configuration: row.keys["model.act"] for row in rows}["gpt2-nano-none-gelu"] == "gelu"


def test_the_command_prints_and_saves(
    summarize: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "table.csv"
    assert summarize.main([str(folder), "--baseline", "first", "--out", str(out)]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "gpt2-nano-none-relu *" in printed
    assert "no block norms, final norm kept" in printed
    saved = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    with out.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["configuration"] for line in lines] == [row["configuration"] for row in saved["rows"]]
    assert saved["baseline"] == "gpt2-nano-none-relu"
    assert float(lines[0]["loss"]) == saved["rows"][0]["loss"]


def test_an_unknown_baseline_names_the_choices(
    summarize: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summarize.main([str(folder), "--baseline", "gpt2-nano-layernorm-rel"]) == EXIT_CONFIG
    assert "Did you mean 'gpt2-nano-layernorm-relu'?" in capsys.readouterr().err


def test_a_terminal_of_80_columns_shows_whole_numbers_and_names(
    summarize: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    summarize.main([str(folder), "--out", str(tmp_path / "table")])
    printed = capsys.readouterr().out
    rows, _ = summarize.summarize(expand([folder]))
    assert all(row.configuration in printed for row in rows)
    assert all(f"{row.loss:.3f}" in printed for row in rows if row.loss is not None)
    assert "\u2026" not in printed
    assert "pairs" in printed


def test_a_folder_is_no_file_to_write(
    summarize: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert summarize.main([str(folder), "--out", str(tmp_path)]) == EXIT_DIRECTORY
    assert f"--out {tmp_path} is a directory" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before

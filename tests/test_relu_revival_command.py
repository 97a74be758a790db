"""experiments/relu_revival.py as it is typed: what its options name, and what is refused before anything is written."""

import os
import re
from pathlib import Path

import fixtures.make_results as made
import pytest
import relu_revival
from revival import options, overview, place, report, rungs, verdicts_scale
from revival import records as store
from revival.plan import check_patterns, plan
from revival.view import View

from normfree.errors import UserError

# -- cells -------------------------------------------------------------------------------------------------------------


NONE, ALL = report.Named(View("short", "f00d", ())), report.Named(View("short", "f00d", tuple(made.rung_a())))


@pytest.mark.parametrize(
    ("pattern", "ready", "waiting"),
    [
        ("A/relu", 5, ["relu", "relu"]),  # its own seeds, and those at the common rate
        ("A/relu/lr1e-3", 1, ["relu", "relu"]),
        ("*/s101", 20 + 12, None),
        ("B/gelu+embed22.627", 0, ["gelu+embed22.627"]),
        ("B/gelu+e*/lr5e-4/s101", 0, ["gelu+embed22.627", "gelu+embed50"]),
        ("D/stopped*", 5, []),
    ],
)
def test_patterns_name_rungs_arms_and_cells(pattern: str, ready: int, waiting: list[str] | None) -> None:
    found = plan("short", NONE, [pattern])
    assert len(found.cells) == ready
    assert waiting is None or [arm for step in found.waiting for arm in step.arms] == waiting
    check_patterns("short", NONE, [pattern])
    check_patterns("short", ALL, [pattern])


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    for pattern, near in (("A/rleu", "A/relu"), ("relu", "A/relu"), ("B/gelu+embed", "B/gelu+embed50"), ("Q", "Rungs")):
        with pytest.raises(UserError, match=f"--cells {re.escape(pattern)} names no cell.*{re.escape(near)}"):
            check_patterns("short", NONE, ["A", pattern])
    for results in (NONE, ALL):
        with pytest.raises(UserError, match=r"s9 names no cell .* near it: A/gelu"):
            check_patterns("short", results, ["A/gelu/*/s9"])
    check_patterns("short", NONE, ["A/gelu/lr3e-3/s1"])  # it may yet be chosen
    with pytest.raises(UserError, match="lr3e-3"):
        check_patterns("short", ALL, ["A/gelu/lr3e-3/s1"])


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_lists_and_checks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert relu_revival.main(["--scale", "smoke", "--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "0 cells are done; 4 can be trained now" in printed
    assert "no cell counts as done" in printed


def test_what_is_typed_is_checked_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 64 or 73, the option by its name, and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "visible_gpus", lambda: ("0", "3"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "A.txt").touch()
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    short = "--scale short --corpus full"
    for typed, said in (
        ("--scale short", "--scale short needs --corpus DIR"),
        (f"{short} --cells A/rleu", "--cells A/rleu names no cell"),
        ("--dry-run --cells B", "--cells B names no cell of scale smoke"),
        ("--merge gone", "--merge gone is no folder. Expected is what --out DIR wrote"),
        ("--merge empty", "--merge empty is empty"),
        ("--known gone", "--known gone is no folder"),
        ("--known empty full", "--known full holds no results"),
        ("--report --out gone", "--out gone is no folder"),
        ("--report --dry-run", "--report trains nothing: --dry-run does not go with it"),
        ("--scale smoke --report", "--report trains nothing: --scale does not go with it"),
        (f"--merge empty {short}", "--merge trains nothing: --corpus, --scale does not"),
        ("--docs empty", "there is no --report"),
        ("--corpus empty", "--corpus is the text of --scale short or full"),
        (f"{short} --gpus 0,1", "there is no GPU '1'; visible are 0, 3"),
        ("--gpus abc", "there is no GPU 'abc'"),
        ("--together 0", "--together 0 must be more than 0"),
        ("--together=-3", "--together -3 must"),
        ("--budget-minutes 0", "--budget-minutes 0 must"),
        ("--budget-minutes nan", "--budget-minutes nan must"),
        ("--seeds 101", "--seeds 101 must be 1 to 100: seed 101 chooses rates"),
        ("--out file/x", "--out file/x cannot be written"),
        (f"{short} --out full --runs file", "--runs file cannot be written"),
    ):
        code = 73 if "written" in said else 64
        assert (relu_revival.main(typed.split()), said in capsys.readouterr().err) == (code, True), typed
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(options, "visible_gpus", lambda: ())
    assert relu_revival.main(short.split()) == 64
    assert "--gpus none trains on the CPU" in capsys.readouterr().err
    assert (options.gpus("auto", "smoke"), options.gpus("none", "short")) == ((), ())


def test_places_of_results_and_page(tmp_path: Path) -> None:
    """Smoke is not kept with the study's results, and another folder's page is not the study's."""

    def places(*typed: str) -> tuple[Path, Path]:
        a = relu_revival.parser().parse_args(typed)
        options.check(a, {"report"} if a.report else set())
        return options.out(a), options.docs(a)

    made.save([made.make("A", "gelu", 1e-3, 1, 2.0)], tmp_path)
    assert places("--scale", "smoke")[0] == options.SMOKE
    assert places("--known", str(store.RESULTS), "--scale", "short", "--dry-run")[0] == store.RESULTS
    assert places("--report") == (store.RESULTS, options.DOCS)
    assert places("--report", "--out", str(tmp_path)) == (tmp_path, tmp_path / "docs")


def test_gpus_are_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (options.gpus("auto", "short"), options.gpus("1, 1,0", "short")) == (("0", "1"), ("1", "1", "0"))
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "5,7,99")
    assert options.visible_gpus() == ("5", "7")


def test_a_text_that_is_not_there_is_said_in_the_words_that_were_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.py").write_text("x = 1\n" * 2000)
    for scale, name, said in (
        ("short", "empty", r"--corpus .*empty: no file matches"),
        ("short", "other", r"--corpus .*other: its fingerprint is \w{12}, and the study's"),
        ("full", "empty", r"--corpus .*empty, a copy of the set \(train\*"),
        ("full", None, r"HF_HUB_OFFLINE is set. --corpus DIR names a folder"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            place.find(scale, tmp_path / name if name else None)
        assert caught.value.exit_code == 65
        assert "data" not in str(caught.value), scale


def test_every_rung_is_in_the_table_of_the_page() -> None:
    """Arms are counted from the ladder; where this fails, `ARMS` of overview.py has to say what they are now."""
    rows = [row.split(" | ") for row in overview.rungs() if re.match(r"\| [A-G] ", row)]
    assert [row[5].split(":")[0] for row in rows] == ["4", "11", "8", "2", "12", "6", "4"]
    assert rows[2][2:5] == ["GPT-2's dimensions", "128", "211.4 million and 52.4 million"]
    assert rows[4][6] == "GPT-2's dimensions, 2.11 billion, 4 of the 12 arms |"
    scaled = {arm + v for arm in ("gelu", "relu") for v in verdicts_scale.BOTH} | {verdicts_scale.CONTROL}
    assert set(overview.rung_of("short", "B").arms) == scaled | {f"gelu{v}" for v in verdicts_scale.GELU_ONLY}
    assert set(overview.ASKED) == set(overview.ARMS) == set(rungs.LADDER["short"]) >= set(rungs.LADDER["full"])

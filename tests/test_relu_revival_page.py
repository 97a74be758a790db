"""The page of experiments/relu_revival.py: verdicts follow from numbers, and a lost run shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures.make_results as made
import pytest
from revival import report, verdicts
from revival.view import View, views


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page of some results; figures are drawn by another test."""
    for name in ("maps", "loss_against_rate", "seeds", "heads", "trajectories"):
        monkeypatch.setattr(report.figures, name, lambda *a: {})
    n = iter(range(99))

    def write(records: list[dict[str, Any]], scale: str = "short") -> str:
        folder = tmp_path / str(next(n))
        return report.write(made.save(records, folder, scale), folder / "docs").read_text(encoding="utf-8")

    return write


def test_the_verdicts_follow_from_the_numbers(page: Any) -> None:
    text = page(made.rung_a())
    assert "ReLU beats GELU: ReLU \u2212 GELU is \u22120.0994 ± 0.0007 nats" in text.replace(" (n = 5)", "")
    assert "\u22120.0994 at 25 %" in text
    assert "GELU beats ReLU" in text  # with norms
    assert "Norms turn the order round" in text
    assert "GELU's overload is there" in text
    assert "Preliminary" not in text.split("## Method")[0]
    assert "0 of 5 (0 to 52 %)" in text
    assert "52.4 million tokens of 2.1 billion" in text
    assert "Without norms, embeddings x 22.627: not run." in text


def test_a_lost_run_changes_the_page(page: Any) -> None:
    text = page(made.rung_a(lost=("gelu2",)))
    assert "1 of 5 (1 to 72 %)" in text
    assert "Preliminary: Without block norms" in text  # four pairs are left
    assert "| A/gelu/lr1e-3/s2 | 70 | step 70: loss is NaN |" in text
    everything = page(made.rung_a(lost=tuple(f"gelu{seed}" for seed in range(1, 6))))
    assert "no seed of which both arms survived" in everything


def test_a_result_against_the_paper_is_said(page: Any) -> None:
    records = made.rung_a()
    for record in records:
        if record["arm"] == "relu" and not record["tuning"]:
            record["val_loss"] += 0.3
    assert "GELU beats ReLU" in (text := page(records))
    assert "**This contradicts the paper**" in text


@pytest.mark.parametrize("part", [0, 3, 20, 27])
def test_the_page_can_be_made_of_any_part(page: Any, part: int) -> None:
    text = page(made.rung_a()[:part])
    assert "not run" in text.lower()
    assert "rung D: 10 runs" in text


def test_texts_are_never_mixed(tmp_path: Path) -> None:
    ours, other = made.rung_a(), [record | {"fingerprint": "beef"} for record in made.rung_a(seeds=1)]
    found = views(made.save(ours + other, tmp_path))
    assert [(view.fingerprint, len(view.records)) for view in found] == [("f00d", 40), ("beef", 24)]
    again = ours[-1] | {"settings": "changed"}
    assert len(views(made.save([again], tmp_path))[0].records) == 35  # the other seeds of that arm had other settings


def test_other_rungs_have_verdicts_too() -> None:
    records = made.rung_a()
    for seed in range(1, 6):
        for arm, loss in (("gelu", 2.45), ("relu", 2.44)):
            records.append(made.make("B", f"{arm}+embed22.627", 1e-3, seed, loss + 0.1 * seed, 0.5))
            records.append(made.make("F", f"{arm}-finalnorm", 1e-3 if arm == "gelu" else 2e-3, seed, 2.6 + 0.1 * seed))
        slopes = {"steps": [0, 100], "values": [[0.1, 0.1], [0.01 * seed, -0.01 * seed]]}
        records.append(made.make("E", "per_layer:0.1:nodecay", 2e-3, seed, 2.4, slopes=slopes))
        records.append(made.make("D", "stopped:identity", 1e-3, seed, None))
    view = View("short", "f00d", tuple(records))
    assert "90 % of it is gone" in " ".join(verdicts.scale(view))
    assert "the loss changes by +0.1000 ± 0.0000" in " ".join(verdicts.deviations(view))
    assert "its mean is not told apart from 0" in verdicts.slopes(view)[0]
    assert "lost 5 of 5 (48 to 100 %), at steps 70 to 70" in verdicts.collapse(view)[0]
    assert "costs +0.01275 nats on average" in " ".join(verdicts.wasted(view))  # GELU: all four heads


def test_figures_are_drawn_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record for record in made.rung_a(lost=("relu1", "relu2"), seeds=2) if "ln" not in record["arm"]]
    slopes = {"steps": [0, 100], "values": [[0.1, 0.1], [0.01, -0.01]]}
    records.append(made.make("E", "per_layer:0.1:nodecay", 2e-3, 1, 2.4, slopes=slopes, words=["model.act_slope=0.1"]))
    counts = {"steps": [0, 100], "attn_probs": [[0, 0], [5, 9]]}
    records.append(made.make("D", "paper_nan:identity", 1e-3, 1, None, nan_counts=counts))
    view = View("short", "f00d", tuple(records))
    figures = report.figures
    monkeypatch.setattr(figures, "DPI", 60)
    drawn = figures.maps(view, "A", tmp_path) | figures.loss_against_rate(view, "A", tmp_path)
    drawn |= figures.seeds(view, "A", tmp_path) | figures.heads(view, "A", tmp_path)
    drawn |= figures.trajectories(view, "D", tmp_path) | figures.trajectories(view, "E", tmp_path)
    assert set(drawn) == {"maps", "ranges", "layers", "rates", "seeds", "heads", "nan", "slopes"}
    assert all(path.stat().st_size > 2000 for path in drawn.values())
    assert figures.maps(view, "C", tmp_path) == {}

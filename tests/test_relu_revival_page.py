"""The page of experiments/relu_revival.py: verdicts follow from numbers, and a lost run shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures.make_results as made
import pytest
from revival import figures_rates, figures_scale, figures_seeds, front, report, verdicts
from revival import records as store
from revival.view import View, views


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page of some results; figures are drawn by another test."""
    for name in ("maps", "heads", "trajectories"):
        monkeypatch.setattr(report.figures, name, lambda *a: {})
    monkeypatch.setattr(figures_rates, "loss_against_rate", lambda *a: {})
    monkeypatch.setattr(figures_seeds, "seeds", lambda *a: {})
    monkeypatch.setattr(figures_scale, "mechanism", lambda *a: {})
    n = iter(range(99))

    def write(records: list[dict[str, Any]], scale: str = "short") -> str:
        folder = tmp_path / str(next(n))
        return report.write(made.save(records, folder, scale), folder / "docs").read_text(encoding="utf-8")

    return write


def keep_figures(monkeypatch: pytest.MonkeyPatch, *drawers: Any) -> list[Any]:
    """The figures that these modules draw, in order, instead of files."""
    drawn: list[Any] = []

    def draw(out: Path, plot: Any, width: float = 6.75) -> Path:
        drawn.append(report.figures.common.figure(width))
        plot(drawn[-1])
        return out

    for drawer in drawers:
        monkeypatch.setattr(drawer, "draw", draw)
    return drawn


def test_the_verdicts_follow_from_the_numbers(page: Any) -> None:
    text = page(made.rung_a())
    assert "ReLU beats GELU: \u22120.0994 ± 0.0007 nats" in text.replace(" (n = 5)", "")
    assert "at 25, 50, 100 % of the run \u22120.0994, \u22120.0994, \u22120.0994" in text
    assert "GELU beats ReLU" in text  # with norms
    assert "Norms turn the order round" in text
    assert "GELU's overload is there" in text
    assert "Preliminary" not in text.split("## Method")[0]
    assert "lost: 0 of 5 (0 to 52 %) each" in text
    assert "52.4 million tokens (0.87 epochs of 60.0 million)" in text
    assert "At the common rate, 2e-3: " not in text  # rung A's runs at it are not there
    assert "(added after rungs A to C were seen); GPT-2's dimensions, T = 128, the published schedule's first" in text
    assert "input explain?**\n\n- Not run.\n" in text


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
    assert "**At rates tuned for each arm this contradicts the paper**" in text


@pytest.mark.parametrize("part", [0, 3, 20, 27])
def test_the_page_can_be_made_of_any_part(page: Any, part: int) -> None:
    text = page(made.rung_a()[:part])
    assert "not run" in text.lower()
    assert "rung D: 10 runs" in text
    assert (
        "| B | Is it scale, of the embeddings or of the activation's input? | Pythia-70M's dimensions | 128 |" in text
    )
    assert "--report --out /" in text
    assert "experiments/results" not in text.partition("**Question.**")[0]
    assert "`experiments/results/relu_revival/`" in report._intro(store.RESULTS)


def test_little_models_are_called_so(page: Any) -> None:
    text = page([record | {"T": 64} for record in made.rung_a(seeds=1)], "smoke")
    assert "Not run: there is no result of scale short or full yet." in text
    assert "### Four arms of a nano model, at one rate" in text
    assert "Pythia-70M's dimensions" not in text.partition("## Results")[2]
    assert report._caption("maps", 64) == "Entropy of every head at the end, one seed"


def test_texts_are_never_mixed(tmp_path: Path) -> None:
    ours, other = made.rung_a(), [record | {"fingerprint": "beef"} for record in made.rung_a(seeds=1)]
    found = views(made.save(ours + other, tmp_path))
    assert [(view.fingerprint, len(view.records)) for view in found] == [("f00d", 40), ("beef", 24)]
    again = ours[-1] | {"settings": "changed"}
    assert len(views(made.save([again], tmp_path))[0].records) == 35  # the other seeds of that arm had other settings


def test_the_published_recipe_has_a_text_for_each_length(page: Any) -> None:
    four, longer = (
        made.rung_a(),
        [made.make("G", f"t256:{arm}", 1e-3, 1, 2.0, fingerprint="beef") for arm in made.LOSSES],
    )
    at_1e_3 = [r | {"lr": 1e-3, "name": f"A/{r['arm']}/lr1e-3/s{r['seed']}"} for r in four if not r["tuning"]]
    text = page(at_1e_3 + longer, "full").partition("## Not run")[2]
    assert "full, rung G: 16 runs" in text
    assert "full, rung A" not in text


def test_bad_steps_of_survivors_are_listed(page: Any) -> None:
    records = made.rung_a()
    records[-1]["bad_steps"] = 7
    text = page(records)
    assert "| A/relu/lr2e-3/s5 | 7 of 100 |" in text
    assert "| short | C | 52.4 million | 2.8 | not run |" in text  # what a cell costs
    assert "| short | C | 211.4 million | 6.6 | not run |" in text
    assert (
        "| short | A | 52.4 million | 1.4 | 1.00 (n = 36) | 9, 8, 36, 4, 3 | H200, 2 cells at a time | 4 of 40 | 20.0 |"
        in text
    )


def test_no_panel_cuts_off_another_s_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Panels share an axis, and heads at the ceiling are whole."""
    figures = report.figures
    heads = {"uniform": [[0.5, 2.0], [-0.01, 0.0]], "mean": [[-3.0, 0.0], [0.0, 0.0]]}
    records = [made.make("A", arm, 1e-3, 1, 2.0, 0.5) for arm in ("gelu", "ln+gelu")]
    records.append(made.make("A", "relu", 1e-3, 1, 2.0, 1.0, heads=heads, pre_activation_std=[[50.0, 90.0]] * 3))
    view, drawn = View("short", "f00d", tuple(records)), keep_figures(monkeypatch, figures, figures_scale)
    figures.heads(view, "A", tmp_path)
    assert all(ax.get_xlim()[1] >= 1.04 for ax in drawn[0].axes)
    figures_scale.mechanism(view, "B", tmp_path)
    axes = [ax for fig in drawn for ax in fig.axes]
    assert len(axes) == 3 + 2 * 3
    for ax in axes:
        low, high = ax.get_ylim()
        values = [y for line in ax.get_lines() for y in line.get_ydata()]
        assert low <= min(values) <= max(values) <= high


def test_a_run_out_of_all_measure_leaves_the_others_their_scale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = [made.make("A", arm, 1e-3, 1, 2.0) for arm in ("gelu", "ln+gelu")]
    records += [
        made.make("A", "relu", 1e-3, seed, 2.0, pre_activation_std=[[x, x]] * 3) for seed, x in ((1, 0.5), (2, 3e8))
    ]
    drawn = keep_figures(monkeypatch, figures_scale)
    figures_scale.mechanism(View("short", "f00d", tuple(records)), "B", tmp_path)
    spread = drawn[0].axes
    assert all(ax.get_ylim()[1] < 100 for ax in spread)
    assert [[text.get_text() for text in ax.texts] for ax in spread] == [[], [], ["up to 3e8"]]


@pytest.mark.parametrize("losses", [(None, None), (2.0, None), (2.0, 6.5)])
def test_what_did_not_learn_stands_above_the_losses(
    losses: tuple[float | None, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of an arm's runs lost, one of them, or one that ended far above: never a line to it, nor an axis for it."""
    drawn = keep_figures(monkeypatch, figures_rates)
    tried = [made.make("A", "gelu", lr, 101, x) for lr, x in zip((1e-3, 2e-3), losses, strict=True)]
    figures_rates.loss_against_rate(View("short", "f00d", tuple(tried)), "A", tmp_path)
    (ax,) = drawn[0].axes
    line, *marks = [line for line in ax.get_lines() if line.get_linestyle() != ":"]
    assert len(line.get_ydata()) == sum(loss == 2.0 for loss in losses)
    assert len(marks) == sum(loss != 2.0 for loss in losses)
    assert all(mark.get_ydata()[0] < 3 for mark in marks)
    assert all(mark.get_ydata()[0] > max(ax.get_yticks(), default=0) for mark in marks)


def test_marks_stand_at_their_rate_above_one_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside it they would say that rates between were run."""
    drawn = keep_figures(monkeypatch, figures_rates)
    arms = {"gelu": (2.0, None, None), "relu": (2.1, 6.5, None)}
    tried = [
        made.make("A", arm, lr, 101, x)
        for arm, losses in arms.items()
        for lr, x in zip((1e-3, 2e-3, 4e-3), losses, strict=True)
    ]
    figures_rates.loss_against_rate(View("short", "f00d", tuple(tried)), "A", tmp_path)
    marks = [line for line in drawn[0].axes[0].get_lines() if line.get_marker() in "^x"]
    places = [(float(mark.get_xdata()[0]), float(mark.get_ydata()[0])) for mark in marks]
    assert sorted(x for x, _ in places) == [2e-3, 2e-3, 4e-3, 4e-3]
    assert len(set(places)) == 4


def test_many_arms_have_a_panel_for_each_that_they_were_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = keep_figures(monkeypatch, figures_rates)
    arms = ("gelu+embed50", "gelu+depth", "relu+embed50", "relu+depth", "ln+gelu+embed22.627")
    tried = [made.make("B", arm, lr, 101, 2.0, tuning=True) for arm in arms for lr in (1e-3, 2e-3)]
    figures_rates.loss_against_rate(View("short", "f00d", (*made.rung_a(), *tried)), "B", tmp_path)
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in drawn[0].axes]
    assert [names[0] for names in legends] == ["LayerNorm + GELU (rung A)", "GELU (rung A)", "ReLU (rung A)"]
    assert list(map(len, legends)) == [2, 3, 3]


def test_figures_are_drawn_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record for record in made.rung_a(lost=("relu1", "relu2"), seeds=2) if "ln" not in record["arm"]]
    slopes = {"steps": [0, 100], "values": [[0.1, 0.1], [0.01, -0.01]]}
    records.append(made.make("E", "per_layer:0.1:nodecay", 2e-3, 1, 2.4, slopes=slopes, words=["model.act_slope=0.1"]))
    counts = {"steps": [0, 100], "attn_probs": [[0, 0], [5, 9]]}
    records.append(made.make("D", "paper_nan:identity", 1e-3, 1, None, nan_counts=counts))
    view = View("short", "f00d", tuple(records))
    figures = report.figures
    monkeypatch.setattr(figures, "DPI", 60)
    drawn = figures.maps(view, "A", tmp_path) | figures_rates.loss_against_rate(view, "A", tmp_path)
    drawn |= figures_seeds.seeds(view, "A", tmp_path) | figures.heads(view, "A", tmp_path)
    drawn |= figures.trajectories(view, "D", tmp_path) | figures.trajectories(view, "E", tmp_path)
    mechanism = View("short", "f00d", (*records, *made.scaled(2.45, 2.44, seeds=1)))
    drawn |= figures_scale.mechanism(mechanism, "B", tmp_path)
    assert figures_scale.mechanism(mechanism, "A", tmp_path) == {}
    assert mechanism.arms("B") == ["gelu+embed50", "relu+embed50"]
    assert View("short", "f00d", tuple(reversed(made.rung_a()))).arms("A") == ["ln+gelu", "ln+relu", "gelu", "relu"]
    titles = figures._measured_on("GELU\nprobe\nbatch, step 800"), figures._measured_on("train batch, step 32260")
    assert titles == ("GELU\ntokens\nof val, step 800", "2.1 billion tokens")
    assert all(path.name.startswith("short_f00d_") for path in drawn.values())
    assert set(drawn) == {"maps", "ranges", "layers", "rates", "seeds", "heads", "nan", "slopes", "spread", "left"}
    assert all(path.stat().st_size > 2000 for path in drawn.values())
    assert figures.maps(view, "C", tmp_path) == {}


def test_the_readme_and_the_page_quote_the_results() -> None:
    root = Path(__file__).parents[1]
    (view,) = (view for view in views(store.RESULTS) if view.scale == "short")
    table = front.at_a_glance(view)
    first = "\n".join(table[: table.index("")])
    assert first.count("\n") == 7
    assert first in (root / "README.md").read_text(encoding="utf-8")
    page = (root / "docs" / "relu-revival.md").read_text(encoding="utf-8")
    assert "\n".join(table) in page
    for question, answer in verdicts.QUESTIONS.items():
        assert question in page
        for line in answer(view):
            assert line.endswith(report.NOT_RUN) or line[1:] in page, line

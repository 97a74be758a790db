"""Losses over seeds, where a run was lost, and which runs are one configuration."""

from pathlib import Path

import numpy as np
import pytest
from drawing import command, draw
from fixtures.make_runs import make_run
from matplotlib.figure import Figure

from normfree.errors import UserError
from normfree.records import RunWriter
from normfree.runs import Run, expand, load_run, lost_at
from plotting import common
from plotting.seeds import group


def test_seeds_are_thin_lines_with_a_mean_that_ends_where_one_is_lost(sweep: Path) -> None:
    fig, rows = draw("loss_curves", expand([sweep]), metrics=["train/loss"])
    (ax,) = fig.axes
    lines = ax.get_lines()
    assert [str(line.get_label()) for line in lines].count("mean") == 2
    means = [line for line in lines if line.get_label() == "mean"]
    assert [max(line.get_xdata()) for line in means] == [500, 250]
    crosses = [line for line in lines if line.get_label() == "lost"]
    assert [list(line.get_xdata()) for line in crosses] == [[500]]  # where its status says that it was lost
    assert len([line for line in lines if str(line.get_label()).startswith("seed")]) == 6
    assert len(ax.collections) == 2  # the bands
    legend = [t.get_text() for t in fig.legends[0].get_texts()]
    assert legend[1] == "gpt2-nano-layernorm-relu (layernorm in the blocks, final norm kept), 3 seeds, 1 of 3 lost"
    by_hand = np.mean([run.metrics["train/loss"].iloc[2] for run in expand([sweep / "a-*"])])
    assert np.asarray(means[0].get_ydata())[2] == pytest.approx(by_hand)
    assert len(rows) == 5 * 11 + 6


def crosses(fig: Figure, label: str) -> list[list[tuple[float, float]]]:
    """(step, value) of the marks with this label, panel by panel."""
    lines = [[line for line in ax.get_lines() if line.get_label() == label] for ax in fig.axes]
    return [[(line.get_xdata()[0], line.get_ydata()[0]) for line in panel] for panel in lines]


def lost_run(directory: Path, **status: object) -> Run:
    """Losses at steps 0 to 10 of a run, of which only the status knows the end."""
    run = make_run(directory, 1, 1, name="lost", steps=(0, 5, 10))
    writer = RunWriter(directory)
    writer.status(**status)
    writer.close()
    return load_run(run.directory)


def test_the_cross_stands_where_the_run_was_lost_and_not_at_its_last_value(tmp_path: Path) -> None:
    run = lost_run(tmp_path / "lost", status="diverged", last_step=20)
    last = {name: run.series(name)[1][-1] for name in ("train/loss", "val/loss")}
    fig, _ = draw("loss_curves", [run])
    assert crosses(fig, "lost") == [[(20, last["train/loss"])], [(20, last["val/loss"])]]
    assert fig.legends[0].get_texts()[-1].get_text() == "run lost at this step (height: its last value)"
    assert crosses(draw("loss_curves", [run], step=0)[0], "lost") == [[], []]  # not lost yet


def test_a_run_of_which_nobody_knows_the_step_is_marked_at_its_last_value(tmp_path: Path) -> None:
    run = lost_run(tmp_path / "failed", status="failed", last_step=None)
    fig, _ = draw("loss_curves", [run], metrics=["train/loss"])
    assert crosses(fig, "last") == [[(10, run.series("train/loss")[1][-1])]]
    assert fig.legends[0].get_texts()[-1].get_text() == "last value of a run that was lost"


def test_a_run_that_trained_on_was_lost_where_its_loss_became_nan_for_good(tmp_path: Path) -> None:
    run = make_run(tmp_path / "on", 1, 1, lost_from=300)
    fig, _ = draw("loss_curves", [run])
    assert [[step for step, _ in panel] for panel in crosses(fig, "lost")] == [[300], [300]]
    assert lost_at(make_run(tmp_path / "never", 1, 1, lost_from=0)) == 0


def test_training_and_validation_by_default_and_one_metric_on_request(runs: dict[str, Run]) -> None:
    assert len(draw("loss_curves", [runs["6x8"]])[0].axes) == 2
    fig, _ = draw("loss_curves", [runs["6x8"]], metrics=["val/loss"], log=True, limits=(1, 20))
    assert [ax.get_ylabel() for ax in fig.axes] == ["Validation loss (nats per token)"]
    assert fig.axes[0].get_yscale() == "log"
    assert fig.axes[0].get_ylim() == (1, 20)


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    twice = [make_run(tmp_path / name, 1, 1, steps=(0,)) for name in "ab"]
    with pytest.raises(UserError, match="same seed 1"):
        group(twice)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    seeds = [make_run(tmp_path / f"s{seed}", 1, 1, seed=seed, steps=()) for seed in (1, 2)]
    assert common.labels(seeds) == ["gpt2-nano-none-relu s1", "gpt2-nano-none-relu s2"]
    rates = [make_run(tmp_path / f"lr{lr}", 1, 1, lr=lr, steps=()) for lr in (0.1, 0.2)]
    assert common.labels(rates) == ["lr0.1", "lr0.2"]
    assert [g.label for g in group(rates)] == ["gpt2-nano-none-relu, lr=0.1", "gpt2-nano-none-relu, lr=0.2"]
    other = make_run(tmp_path / "other", 1, 1, act="gelu", lr=0.3, steps=())
    assert [g.label for g in group([*rates, other])][2] == "gpt2-nano-none-gelu"  # which needs no more


def test_a_run_without_a_fault_says_nothing_of_the_one_that_was_planted(tmp_path: Path) -> None:
    healthy, faulty = (make_run(tmp_path / name, 1, 1, steps=()) for name in ("healthy", "faulty"))
    faulty.config.debug.inject.step, faulty.config.debug.inject.module = 3, "wte"
    healthy.config.rollback.retries = 7  # nobody rolls back here
    first, second = (g.label for g in group([healthy, faulty]))
    assert first == "gpt2-nano-none-relu"
    assert second.startswith("gpt2-nano-none-relu, inject.step=3, inject.module=wte")


def test_in_a_folder_runs_that_recorded_nothing_are_left_out_and_named(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "good", 1, 1, steps=(0,))
    empty = make_run(tmp_path / "empty", 1, 1, seed=2, steps=(), status="running")  # killed
    assert command("entropy_heatmap", tmp_path, "--out", tmp_path / "x.png") == 0
    assert "empty: stopped before its first record, left out" in capsys.readouterr().err
    assert command("entropy_heatmap", empty.directory, "--out", tmp_path / "y.png") == 64
    make_run(tmp_path / "lost", 1, 1, seed=3, steps=(), status="failed")
    assert command("entropy_heatmap", tmp_path, "--out", tmp_path / "y.png") == 64  # never left out

"""What holds for one figure: hatching, scales, refusals, and the bars of the paper."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from drawing import command, draw
from fixtures.make_runs import make_run
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection, QuadMesh
from matplotlib.figure import Figure

from normfree.errors import EXIT_CONFIG, UserError
from normfree.heads import entropy_ceiling
from normfree.runs import Run
from plotting import common

PAPER = json.loads((Path(__file__).parents[1] / "fixtures" / "paper_heatmaps.json").read_text(encoding="utf-8"))


def texts(fig: Figure) -> str:
    found = [t.get_text() for ax in fig.axes for t in (*ax.texts, ax.title, ax._left_title)]  # type: ignore[attr-defined]
    return "\n".join([*found, *(ax.get_ylabel() for ax in fig.axes), *(ax.get_xlabel() for ax in fig.axes)])


def maps(fig: Figure) -> list[Axes]:
    return [ax for ax in fig.axes if ax.get_xlabel() == "Head"]


def numbers_in_cells(ax: Axes) -> int:
    return len(ax.texts)


# ------------------------------------------------------------------------------------------------- entropy_heatmap


def test_nan_cells_are_hatched_and_carry_no_number(runs: dict[str, Run]) -> None:
    run = runs["nan-6x8"]
    fig, _ = draw("entropy_heatmap", [run])
    (ax,) = maps(fig)
    n_nan = int(np.isnan(run.probe_entropy[-1]).sum())
    hatched = [c for c in ax.collections if isinstance(c, PatchCollection)]
    assert [len(c.get_paths()) for c in hatched] == [n_nan]
    assert "/" in str(hatched[0].get_hatch())
    assert numbers_in_cells(ax) == 48 - n_nan
    assert fig.legends[0].get_texts()[0].get_text() == "NaN head"


def test_annotations_are_off_above_12_by_12(runs: dict[str, Run], tmp_path: Path) -> None:
    assert numbers_in_cells(maps(draw("entropy_heatmap", [runs["6x8"]])[0])[0]) == 48
    assert numbers_in_cells(maps(draw("entropy_heatmap", [runs["24x16"]])[0])[0]) == 0
    twelve = make_run(tmp_path / "12", 12, 12, steps=(0,))
    assert numbers_in_cells(maps(draw("entropy_heatmap", [twelve], 3.25)[0])[0]) == 144


def test_several_runs_share_one_scale_from_0_to_the_ceiling(runs: dict[str, Run]) -> None:
    fig, _ = draw("entropy_heatmap", [runs["6x8"], runs["24x16"]])
    meshes = [c for ax in maps(fig) for c in ax.collections if isinstance(c, QuadMesh)]
    assert [m.get_clim() for m in meshes] == [(0, entropy_ceiling(128))] * 2
    assert [ax.yaxis_inverted() for ax in maps(fig)] == [True, True]  # layer 0 at the top


def test_mixed_sequence_lengths_are_shown_relative_to_their_ceilings(runs: dict[str, Run]) -> None:
    fig, _ = draw("entropy_heatmap", [runs["6x8"], runs["long"]])
    (mesh,) = (c for c in maps(fig)[1].collections if isinstance(c, QuadMesh))
    assert mesh.get_clim() == (0, 1)
    shown = np.asarray(mesh.get_array())
    assert shown == pytest.approx(runs["long"].probe_entropy[-1] / entropy_ceiling(256))
    assert "fraction of the run's ceiling" in texts(fig)


def test_differences_are_to_the_first_run_and_centred_on_0(runs: dict[str, Run], tmp_path: Path) -> None:
    entropies = (np.full((2, 2), 2.0), np.array([[1.5, 2.25], [2.0, np.nan]]))
    first, other = (make_run(tmp_path / str(i), 2, 2, entropy=e, steps=(0,)) for i, e in enumerate(entropies))
    fig, rows = draw("entropy_heatmap", [first, other], difference=True, source="train")
    assert [row["difference"] for row in rows] == pytest.approx([-0.5, 0.25, 0, np.nan], nan_ok=True)
    (mesh,) = (c for c in maps(fig)[0].collections if isinstance(c, QuadMesh))
    low, high = mesh.get_clim()
    assert (-low, high) == pytest.approx((0.5, 0.5))
    tiny = make_run(tmp_path / "tiny", 2, 2, entropy=entropies[0] + 0.002, steps=(0,))
    fig, _ = draw("entropy_heatmap", [first, tiny], difference=True, source="train")
    assert [t.get_text() for t in fig.axes[-1].get_xticklabels()] == ["-0.002", "-0.001", "0", "0.001", "0.002"]
    with pytest.raises(UserError, match="at least two runs"):
        draw("entropy_heatmap", [runs["6x8"]], difference=True)
    with pytest.raises(UserError, match="24 x 16"):
        draw("entropy_heatmap", [runs["6x8"], runs["24x16"]], difference=True)


def test_a_difference_is_of_one_step_that_both_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path / "R", 2, 2, name="R", steps=(0, 2, 300))
    other = make_run(tmp_path / "G", 2, 2, name="G", seed=2, steps=(0, 2, 4))
    fig, rows = draw("entropy_heatmap", [first, other], difference=True)
    assert "G minus R" in texts(fig)
    assert "probe batch, step 2, the newest that both have" in texts(fig).replace("\n", " ")
    assert {row["step"] for row in rows} == {2}
    expected = other.probe_entropy[1].astype(float) - first.probe_entropy[1]
    assert [row["difference"] for row in rows] == pytest.approx(expected.ravel().tolist())
    fig, rows = draw("entropy_heatmap", [first, other], difference=True, step=0)
    assert "step 0\n" in texts(fig)
    assert {row["step"] for row in rows} == {0}
    assert command("entropy_heatmap", first.directory, other.directory, "--difference", "--step", 4) == EXIT_CONFIG
    assert "both have: 0, 2." in capsys.readouterr().err


def test_a_difference_of_runs_without_a_common_step_is_refused(tmp_path: Path) -> None:
    first, other = (make_run(tmp_path / str(step), 2, 2, steps=(step,)) for step in (3, 4))
    with pytest.raises(UserError, match=r"no record of the same step; .*has 3, .*has 4\."):
        draw("entropy_heatmap", [first, other], difference=True)


def test_a_difference_is_never_of_a_probe_and_a_training_batch(runs: dict[str, Run], tmp_path: Path) -> None:
    without = make_run(tmp_path / "without", 6, 8, probe=False, seed=2)
    _, rows = draw("entropy_heatmap", [runs["6x8"], without], difference=True)
    expected = without.entropy[-1].astype(float) - runs["6x8"].entropy[-1]
    assert {row["source"] for row in rows} == {"train"}
    assert [row["difference"] for row in rows] == pytest.approx(expected.ravel().tolist())


def test_the_title_says_what_it_shows(runs: dict[str, Run], tmp_path: Path) -> None:
    fig, _ = draw("entropy_heatmap", [runs["6x8"]], step=100)
    assert "clean-6x8\nno block norms, final norm kept\nprobe batch, step 100" in texts(fig)
    fig, _ = draw("entropy_heatmap", [runs["6x8"]], source="train")
    assert "train batch, step 500" in texts(fig)
    without = make_run(tmp_path / "without", 2, 2, probe=False, steps=(0,))
    assert "train batch" in texts(draw("entropy_heatmap", [without])[0])
    with pytest.raises(UserError, match="nothing recorded under 'probe_attn_entropy'"):
        draw("entropy_heatmap", [without], source="probe")


def test_a_sequence_of_one_token_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one-token", 2, 2, seq_len=1, steps=(0, 1))
    for script in ("entropy_heatmap", "layerwise_entropy"):
        draw(script, [run])
    with pytest.raises(UserError, match="no range"):
        draw("entropy_ranges", [run])


# ----------------------------------------------------------------------------------- layerwise_entropy, learned_slopes


def test_a_single_record_is_a_profile_over_the_layers(runs: dict[str, Run]) -> None:
    fig, rows = draw("layerwise_entropy", [runs["one"]])
    line = fig.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == list(range(6))
    assert line.get_ydata() == pytest.approx(runs["one"].probe_entropy[0].mean(axis=1), rel=1e-6)
    assert {row["step"] for row in rows} == {500}


def test_a_layer_without_a_head_left_is_a_gap_with_a_cross(runs: dict[str, Run]) -> None:
    fig, _ = draw("layerwise_entropy", [runs["nan-6x8"]])
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    assert np.isnan(np.asarray(lines["layer 5"].get_ydata())[-1])
    crosses = sorted(zip(*(np.asarray(d).tolist() for d in lines["first NaN head"].get_data()), strict=True))
    assert [step for step, _ in crosses] == [250, 250, 300]  # layers 4 and 5 have no mean at step 300, layer 3 has


def test_few_layers_have_a_legend_and_many_a_colour_bar(runs: dict[str, Run]) -> None:
    fig, _ = draw("learned_slopes", [runs["6x8"]])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [f"layer {i}" for i in range(6)]
    styles = {str(line.get_linestyle()) for line in fig.axes[0].get_lines() if "layer" in str(line.get_label())}
    assert len(styles) > 1  # told apart without colour
    fig, _ = draw("learned_slopes", [runs["24x16"]])
    assert not fig.legends
    assert any(ax.get_xlabel() == "Layer (0 = input)" for ax in fig.axes)


# ------------------------------------------------------------------------------------------------------- nan_counts


def test_a_run_without_nan_says_so(runs: dict[str, Run]) -> None:
    fig, rows = draw("nan_counts", [runs["6x8"]])
    assert "no NaN in 11 records\n(6 layers, steps 0 to 500)" in texts(fig)
    assert not any(np.isfinite(np.asarray(line.get_ydata())).any() for line in fig.axes[0].get_lines())
    assert len(rows) == 66
    assert "no Inf in 11 records" in texts(draw("nan_counts", [runs["6x8"]], kind="inf")[0])


def test_the_first_nan_is_named(runs: dict[str, Run]) -> None:
    fig, _ = draw("nan_counts", [runs["nan-6x8"]])
    assert "first NaN: step 300, layer 3" in texts(fig).replace(",\n", ", ")


def test_no_count_is_claimed_between_records(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 2, nan_from=20, steps=(0, 10, 20))
    fig, _ = draw("nan_counts", [run])
    line = fig.axes[0].get_lines()[1]
    assert "marks: records" in texts(fig)
    assert (line.get_drawstyle(), line.get_marker()) == ("steps-post", "o")  # 0 up to step 20, and a mark there
    many = make_run(tmp_path / "many", 1, 1, nan_from=20, steps=tuple(range(200)))
    assert draw("nan_counts", [many])[0].axes[0].get_lines()[0].get_marker() == "None"


@pytest.mark.parametrize("width", common.WIDTHS)
def test_no_line_crosses_the_words_about_the_first_nan(tmp_path: Path, width: float) -> None:
    starts = (0, 50, 300, 500)
    fig, _ = draw(
        "nan_counts", [make_run(tmp_path / f"from{i}", 12, 1, name=f"{i}", nan_from=i) for i in starts], width
    )
    with matplotlib.rc_context(common.STYLE):
        common.make_room(fig)
    for ax in fig.axes[: len(starts)]:
        words = ax.texts[0].get_window_extent()
        highest = max(np.nanmax(line.get_ydata()) for line in ax.get_lines() if "layer" in str(line.get_label()))
        assert words.y0 > ax.transData.transform((0, highest))[1] + 2


def test_attention_probabilities_are_counted_per_head(runs: dict[str, Run]) -> None:
    run = runs["nan-6x8"]
    fig, rows = draw("nan_counts", [run], site="attn_probs")
    assert [row["nan_count"] for row in rows] == (run.counts["attn_probs"] / 8).ravel().tolist()
    assert "per head" in texts(fig).replace("\n", " ")
    with pytest.raises(UserError, match=r"never infinite\. Other sites: block, attn, mlp, q, k, v, mlp_hidden\."):
        draw("nan_counts", [run], kind="inf", site="attn_probs")


# --------------------------------------------------------------------------------------------------- entropy_ranges


def test_the_heat_maps_of_the_paper_give_its_bars(tmp_path: Path) -> None:
    found = [
        make_run(tmp_path / name, 12, 12, name=name, entropy=np.array(values), steps=(0,))
        for name, values in PAPER["data"].items()
    ]
    fig, rows = draw("entropy_ranges", found, source="train")
    heights = np.array([[patch.get_height() for patch in bars] for bars in fig.axes[0].containers])
    published = [PAPER["published_percent"][name] for name in PAPER["data"]]
    assert heights == pytest.approx(np.array(published), abs=1.0)
    assert [row["run"] for row in rows[::4]] == list(PAPER["data"])


def test_nan_heads_get_bars_of_their_own(runs: dict[str, Run]) -> None:
    _, rows = draw("entropy_ranges", [runs["6x8"], runs["nan-6x8"]])
    assert [(r["range"], r["heads"]) for r in rows if r["range"] == "NaN"] == [("NaN", 0), ("NaN", 20)]


def test_shares_of_different_lengths_are_refused(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("entropy_ranges", runs["6x8"].directory, runs["long"].directory) == EXIT_CONFIG
    assert "not comparable: clean-6x8 has data.seq_len=128, long has data.seq_len=256" in capsys.readouterr().err


def test_quarters_of_another_maximum(runs: dict[str, Run]) -> None:
    top = float(runs["6x8"].probe_entropy[-1].max())
    rows = draw("entropy_ranges", [runs["6x8"]], maximum="observed")[1]
    assert rows[-1]["high"] == pytest.approx(top)
    assert draw("entropy_ranges", [runs["6x8"]], maximum="log_t")[1][-1]["high"] == pytest.approx(np.log(128))


def test_no_two_runs_look_the_same_and_more_than_that_are_refused(runs: dict[str, Run]) -> None:
    fig, _ = draw("entropy_ranges", [runs["6x8"]] * 14)
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in fig.axes[0].containers}
    assert len(looks) == 14
    with pytest.raises(UserError, match="15 runs are too many to tell their bars apart: at most 14"):
        draw("entropy_ranges", [runs["6x8"]] * 15)
    with pytest.raises(UserError, match=r"at most 7, or 14 with --width 6\.75"):
        draw("entropy_ranges", [runs["6x8"]] * 8, 3.25)

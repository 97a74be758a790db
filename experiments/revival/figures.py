"""The figures of docs/relu-revival.md, drawn by the scripts of plotting/ from run directories made of the results."""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normfree.config import Config
from normfree.heads import OVERLOADED
from normfree.records import RunWriter
from normfree.runs import SITES, Run, load_run
from plotting import common, entropy_heatmap, entropy_ranges, layerwise_entropy, learned_slopes, nan_counts
from revival import words
from revival.cases import about
from revival.cells import PUBLISHED_STEPS, PUBLISHED_T
from revival.heads_table import costs, replaceable
from revival.records import Record, is_lost, numbers
from revival.view import FOUR, View

PUBLISHED = Path(__file__).parents[2] / "tests" / "fixtures" / "paper_heatmaps.json"
NAMES = {"ln+gelu": "SM+LN+G", "ln+relu": "SM+LN+R", "gelu": "SM+G", "relu": "SM+R"}  # the papers' names of the arms
REPLACED = (("mean", common.COLOURS[1], "^"), ("uniform", common.COLOURS[0], "o"))  # kind, colour, marker
WIDE = 8.2  # inches: four maps side by side


def config_of(record: Record, name: str) -> Config:
    """As much of a configuration as the figures read."""
    config = Config(name=name, seed=record["seed"])
    model = config.model
    model.n_layer, model.n_head, model.n_embd = record["n_layer"], record["n_head"], record["n_embd"]
    model.norm, model.act, model.final_norm = record["norm"], record["act"], record["final_norm"]
    model.block_size = config.data.seq_len = record["T"]
    slope = next((w.partition("=")[2] for w in record["words"] if w.startswith("model.act_slope=")), None)
    model.act_slope = float(slope) if slope else model.act_slope
    return config


def at_the_end(record: Record, name: str, directory: Path) -> Run:
    """A run directory with the entropy of every head at the end, measured on the tokens that are reported."""
    writer = RunWriter(directory)
    writer.config(config_of(record, name))
    entropy = numbers(record["entropy"]).astype(np.float32)
    writer.array("probe_attn_entropy", record["last_step"], entropy, ("layer", "head"), "nats")
    writer.close()
    return load_run(directory)


def on_the_way(record: Record, name: str, directory: Path) -> Run:
    """A run directory with the layers' mean entropies over steps: each layer as if it had one head."""
    writer = RunWriter(directory)
    writer.config(config_of(record, name))
    for step, layers in zip(record["steps_kept"], numbers(record["layer_entropy"]), strict=True):
        writer.array("probe_attn_entropy", step, layers[:, None].astype(np.float32), ("layer", "head"), "nats")
    if "slopes" in record:
        for step, slopes in zip(record["slopes"]["steps"], numbers(record["slopes"]["values"]), strict=True):
            axes = ("layer",) if len(slopes) == record["n_layer"] else ("shared",)
            writer.array("act_slope", step, slopes.astype(np.float32), axes, "")
    _counts(writer, record)
    writer.close()
    return load_run(directory)


def _counts(writer: RunWriter, record: Record) -> None:
    """NaN and Inf counts, of the sites that had any."""
    for kind in ("nan", "inf"):
        found: Record = record.get(f"{kind}_counts") or {}
        steps: list[int] = found.get("steps") or record["steps_kept"]
        table = np.zeros((len(steps), len(SITES), record["n_layer"]), np.int64)
        for site in [name for name in SITES if name in found]:
            table[:, SITES.index(site)] = np.array(found[site])
        for step, counts in zip(steps, table, strict=True):
            writer.array(f"{kind}_count", step, counts, ("site", "layer"), "elements")


def published(arm: str, directory: Path) -> Run:
    """The published map of an arm (GPT-2 124M, CodeParrot), as a run directory."""
    values_ = np.array(json.loads(PUBLISHED.read_text(encoding="utf-8"))["data"][NAMES[arm]], dtype=np.float32)
    config = Config(name=f"published, GPT-2 124M: {words.arm_words(arm)}")
    config.model.n_layer, config.model.n_head = values_.shape
    config.model.norm, config.data.seq_len = ("layernorm" if arm.startswith("ln") else "none"), PUBLISHED_T
    writer = RunWriter(directory)
    writer.config(config)
    writer.array("attn_entropy", PUBLISHED_STEPS, values_, ("layer", "head"), "nats")
    writer.close()
    return load_run(directory)


def one_of(view: View, rung: str, arm: str) -> Record | None:
    """The run that stands for an arm in pictures: of its own best rate, the lowest seed that was not lost."""
    kept = [record for record in view.own(rung, arm) if not is_lost(record)]
    return kept[0] if kept else None


def _titled(record: Record, prefix: str = "") -> str:
    """`prefix`: of an arm's name, where a figure says it once for all its panels."""
    arm = words.arm_words(record["arm"].removeprefix(prefix))
    return f"{arm}, rate {words.rate_name(record['lr'])}, seed {record['seed']}"


# -- drawing -----------------------------------------------------------------------------------------------------------


DPI = 120


def stem(view: View, rung: str) -> str:
    """How a figure's file name begins: results of two texts never overwrite each other."""
    return f"{view.scale}_{view.fingerprint[:6]}_{rung}"


def draw(out: Path, plot: Callable[[Figure], object], width: float = common.WIDTHS[1]) -> Path:
    with matplotlib.rc_context(common.STYLE | {"savefig.dpi": DPI}):
        fig = common.figure(width)
        plot(fig)
        common.save(fig, out)
    return out


def maps(view: View, rung: str, folder: Path, prefix: str = "") -> dict[str, Path]:
    """Heat maps and ranges of the four arms with the published ones, and entropy by layer over steps."""
    found = [(arm, record) for arm in FOUR if (record := one_of(view, rung, prefix + arm))]
    if not found:
        return {}
    name = stem(view, rung) + (f"_{prefix.rstrip(':')}" if prefix else "")
    drawn: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        ends = [at_the_end(record, _titled(record, prefix), base / f"end{i}") for i, (_, record) in enumerate(found)]
        ways = [on_the_way(record, _titled(record, prefix), base / f"way{i}") for i, (_, record) in enumerate(found)]
        theirs = [published(arm, base / f"published{i}") for i, (arm, _) in enumerate(found)]
        same = found[0][1]["T"] == PUBLISHED_T  # shares and ceilings of other lengths do not compare
        both = ends + theirs if same else ends
        plots: dict[str, Callable[[Figure], object]] = {
            "maps": lambda fig: _maps(fig, both),
            "ranges": lambda fig: _ranges(fig, ends, theirs if same else []),
            "layers": lambda fig: layerwise_entropy.plot(ways, fig),
        }
        for kind, plot in plots.items():
            titled = _under(about(rung, prefix), plot)
            drawn[kind] = draw(folder / f"{name}_{kind}.png", titled, WIDE if kind == "maps" else common.WIDTHS[1])
    return drawn


def _under(title: str, plot: Callable[[Figure], object]) -> Callable[[Figure], None]:
    """A plot with a title over all its panels."""

    def titled(fig: Figure) -> None:
        plot(fig)
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)

    return titled


def _measured_on(text: str) -> str:
    """A run directory knows a probe and a training batch; the map at the end is of the tokens that are reported, and of
    the published one it is only known how long it was trained.
    """
    text = re.sub(r"probe(\s)batch,", r"tokens\1of val,", text)
    return re.sub(rf"train(\s)batch,(\s)step {PUBLISHED_STEPS}", r"2.1\1billion\2tokens", text)


def _maps(fig: Figure, runs: Sequence[Run]) -> None:
    """Titled by what they were measured on: held-out tokens that are reported, or the papers' training batch."""
    entropy_heatmap.plot(runs, fig)
    for ax in fig.axes:
        ax.set_title(_measured_on(ax.get_title("left")))


def _ranges(fig: Figure, ours: Sequence[Run], theirs: Sequence[Run]) -> None:
    """Ours above, the published bars below; named as in `_maps`."""
    parts = [runs for runs in (ours, theirs) if runs]
    common.set_height(fig, 3.2 * len(parts))
    panels = fig.subfigures(len(parts), 1, squeeze=False).ravel()
    for part, runs in zip(panels, parts, strict=True):
        entropy_ranges.plot(runs, part)
        part.axes[0].sharey(panels[0].axes[0])
        for text in part.legends[0].get_texts():
            text.set_text(_measured_on(text.get_text()))


def trajectories(view: View, rung: str, folder: Path) -> dict[str, Path]:
    """Learned slopes, and NaN or Inf counts, of the runs of a rung that have them: one seed an arm."""
    drawn: dict[str, Path] = {}
    firsts = [view.reported(rung, arm)[0] for arm in view.arms(rung) if view.reported(rung, arm)]
    sloped = [record for record in firsts if "slopes" in record]
    bad = [record for record in firsts if record.get("nan_counts") or record.get("inf_counts")]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        if rung == "D" and firsts:
            ways = [on_the_way(r, _titled(r), base / f"way{i}") for i, r in enumerate(firsts)]
            drawn["layers"] = draw(folder / f"{stem(view, rung)}_layers.png", lambda f: layerwise_entropy.plot(ways, f))
        if sloped:
            runs = [on_the_way(r, _titled(r), base / f"slope{i}") for i, r in enumerate(sloped)]
            drawn["slopes"] = draw(folder / f"{stem(view, rung)}_slopes.png", lambda f: learned_slopes.plot(runs, f))
        if bad:
            kind = "nan" if any(r.get("nan_counts") for r in bad) else "inf"
            counted = [on_the_way(r, _titled(r), base / f"bad{i}") for i, r in enumerate(bad)]
            site = "attn_probs" if any("attn_probs" in r.get("nan_counts", {}) for r in bad) else "block"
            drawn["nan"] = draw(
                folder / f"{stem(view, rung)}_nan.png",
                lambda f: nan_counts.plot(counted, f, kind=kind, site=site if kind == "nan" else "mlp"),
            )
    return drawn


def heads(view: View, rung: str, folder: Path) -> dict[str, Path]:
    """Cost of replacing a head's attention by uniform attention, against the head's level; all seeds of an arm."""
    found = {}
    for arm in view.arms(rung):
        if records := replaceable(view.own(rung, arm)):
            found[arm] = costs(records)
    if not found:
        return {}

    def plot(fig: Figure) -> None:
        columns = min(4, len(found))
        lines = -(-len(found) // columns)
        common.set_height(fig, 0.6 + 1.7 * lines)
        axes = common.grid(fig, len(found), columns)
        for i, (ax, (arm, cost)) in enumerate(zip(axes, found.items(), strict=True)):
            if i:
                ax.sharey(axes[0])  # before it is drawn: shared limits then hold the points of all panels
            ax.axvspan(OVERLOADED, 1, color="0.94", zorder=0)
            ax.axhline(0, color="k", linewidth=0.6, zorder=0)
            for kind, colour, mark in REPLACED:
                ax.plot(cost.level, getattr(cost, kind), mark, ms=2.5, mfc="none", mew=0.6, color=colour, alpha=0.7)
            ax.set_yscale("symlog", linthresh=1e-3)
            ax.set_xlim(-0.05, 1.05)  # whole points at both ends
            ax.set_title(common.wrapped(words.arm_words(arm), 6.75 / columns - 0.4))
            if i % columns == 0:
                ax.set_ylabel("Change of loss (nats)")
            ax.set_xlabel("Entropy / ceiling")
        names = {"uniform": "uniform attention", "mean": "its own mean over other sequences"}
        handles = [Line2D([], [], color=c, marker=mark, ls="", mfc="none", label=names[k]) for k, c, mark in REPLACED]
        fig.legend(handles=handles, loc="outside lower right", ncols=2, title="in the place of a head's attention")

    return {"heads": draw(folder / f"{stem(view, rung)}_heads.png", plot)}

"""Attention entropy of every head: layer x head, several runs on one scale from 0 to the ceiling.

Layer 0, which reads the embeddings, is at the top. Runs of different sequence lengths have different ceilings and are
shown relative to their own. `--difference` subtracts the first run from each of the others, at the newest step that
both have.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection, QuadMesh
from matplotlib.figure import FigureBase
from matplotlib.patches import Rectangle

from normfree.errors import UserError
from normfree.heads import entropy_ceiling, relative_entropy
from normfree.runs import Run
from plotting import common

MAP, DIFFERENCE_MAP = "cividis", "RdBu_r"  # perceptually uniform; both readable without colour vision
ANNOTATED = 12  # cells carry their number up to 12 x 12
COLUMN = 2.0  # inches a panel needs at least
WIDEST = 1.6  # inches of a cell: four heads fill the width


@dataclass
class Panel:
    """One map: `values` (n_layer, n_head) in the unit of the colour bar, NaN where the head was NaN."""

    run: Run
    label: str
    source: str
    step: int
    values: np.ndarray
    said: str = ""  # about the step, after its number


@dataclass
class Scale:
    """One colour scale for all panels, with ticks at quarters and the words below them."""

    low: float
    high: float
    map: str
    label: str
    words: Sequence[str]

    @property
    def ticks(self) -> np.ndarray:
        return np.linspace(self.low, self.high, 5)


def plot(
    runs: Sequence[Run],
    fig: FigureBase,
    *,
    step: int | None = None,
    source: str | None = None,
    difference: bool = False,
) -> list[common.Row]:
    """Draw one map a run; return a row (run, step, layer, head, entropy, relative entropy) for every cell."""
    relative = len({common.seq_len(run) for run in runs}) > 1
    labels = common.labels(runs)
    if difference:
        panels = _differences(runs, labels, step, source, relative)
        rows = [row for panel in panels for row in _rows(panel, "difference")]
    else:
        panels = [_panel(run, label, step, source) for run, label in zip(runs, labels, strict=True)]
        rows = [row for panel in panels for row in _rows(panel)]
        for panel in panels if relative else ():
            panel.values = relative_entropy(panel.values, common.seq_len(panel.run))
    scale = _scale(panels, relative, difference)
    _draw(panels, fig, scale)
    return rows


def _panel(run: Run, label: str, step: int | None, source: str | None) -> Panel:
    found, steps, values = common.sourced(run, "attn_entropy", source)
    i = common.index_of(run, steps, step)
    return Panel(run, label, found, int(steps[i]), values[i])


def _rows(panel: Panel, kind: str = "entropy") -> list[common.Row]:
    fixed = {"run": panel.label, "directory": panel.run.directory, "source": panel.source, "step": panel.step}
    return [
        {**fixed, "layer": layer, "head": head, kind: float(value)}
        for (layer, head), value in np.ndenumerate(panel.values)
    ]


def _differences(
    runs: Sequence[Run], labels: Sequence[str], step: int | None, source: str | None, relative: bool
) -> list[Panel]:
    """One panel for each run but the first: what it has more than the first at a step of both."""
    if len(runs) < 2:
        raise UserError("--difference subtracts the first run from the others: name at least two runs.")
    panels = []
    for other, label in zip(runs[1:], labels[1:], strict=True):
        found, at, said = _common_step(runs[0], other, step, source)
        first, panel = _panel(runs[0], labels[0], at, found), _panel(other, label, at, found)
        if panel.values.shape != first.values.shape:
            shapes = [f"{p.label} has {' x '.join(map(str, p.values.shape))}" for p in (first, panel)]
            raise UserError(f"--difference needs runs with the same layers x heads; {', '.join(shapes)}.")
        minuend, subtrahend = (
            relative_entropy(p.values, common.seq_len(p.run)) if relative else p.values.astype(np.float64)
            for p in (panel, first)
        )
        panels.append(Panel(other, f"{label} minus {labels[0]}", found, at, minuend - subtrahend, said))
    return panels


def _common_step(first: Run, other: Run, step: int | None, source: str | None) -> tuple[str, int, str]:
    """(source, step, words): the step asked for, else the newest of both; an error names the steps both have."""
    name, steps, _ = common.sourced(first, "attn_entropy", source)
    found, others, _ = common.sourced(other, "attn_entropy", source)
    if found != name:  # only one of them has a probe
        name = "train"
        steps, others = (common.sourced(run, "attn_entropy", name)[1] for run in (first, other))
    both = np.intersect1d(steps, others)
    if not len(both):
        each = [f"{run.directory} has {common.listed(at)}" for run, at in ((first, steps), (other, others))]
        raise UserError(f"--difference: the runs have no record of the same step; {', '.join(each)}.")
    if step is not None and step not in both:
        raise UserError(
            f"--difference --step {step}: {first.directory} and {other.directory} do not both have a record there; "
            f"both have: {common.listed(both)}."
        )
    newest = int(both[-1])
    said = ", the newest that both have" if step is None and (steps[-1] != newest or others[-1] != newest) else ""
    return name, newest if step is None else step, said


def _scale(panels: Sequence[Panel], relative: bool, difference: bool) -> Scale:
    """0 to the ceiling, or symmetric about 0 for differences."""
    unit = "fraction of the run's ceiling ln(T!)/T" if relative else "nats"
    if difference:
        largest = max((float(np.nanmax(np.abs(p.values))) for p in panels if not np.isnan(p.values).all()), default=0)
        top = largest or 1.0
        return Scale(-top, top, DIFFERENCE_MAP, f"Difference of attention entropy ({unit})", [""] * 5)
    T = common.seq_len(panels[0].run)
    top = 1.0 if relative else entropy_ceiling(T) or 1.0  # T = 1: the ceiling is 0, and so is every entropy
    label = f"Attention entropy ({unit})" + ("" if relative else f"; ceiling ln(T!)/T at T\u00a0=\u00a0{T}")
    return Scale(0, top, MAP, label, ["", "1/4", "1/2", "3/4", "ceiling"])


def _draw(panels: Sequence[Panel], fig: FigureBase, scale: Scale) -> None:
    width = common.size(fig)[0]
    columns = min(len(panels), max(1, int(width / COLUMN)))
    titles = [_title(panel, width / columns - 0.45) for panel in panels]
    cell_width, cell_height = _fit(fig, panels, titles, columns)
    axes = common.grid(fig, len(panels), columns)
    for ax, panel, title in zip(axes, panels, titles, strict=True):
        mesh = _map(ax, panel.values, scale)
        if cell_width == WIDEST:  # a handful of heads does not fill the width
            ax.set_box_aspect(panel.values.shape[0] * cell_height / (panel.values.shape[1] * cell_width))
        _annotate(ax, panel.values, scale, cell_width, cell_height)
        ax.set_title(title)
    _colour_bar(fig, mesh, axes, scale, width)
    if any(np.isnan(p.values).any() for p in panels):
        fig.legend(handles=[common.nan_legend("NaN head")], loc="outside lower right")


def _title(panel: Panel, inches: float) -> str:
    text = f"{panel.label}\n{common.describe(panel.run)}\n{panel.source} batch, step {panel.step}{panel.said}"
    return common.wrapped(text, inches)


def _fit(fig: FigureBase, panels: Sequence[Panel], titles: Sequence[str], columns: int) -> tuple[float, float]:
    """Inches of a cell (width, height); sets the figure's height so that cells, titles and colour bar have room."""
    lines = -(-len(panels) // columns)
    n_layer, n_head = (max(p.values.shape[axis] for p in panels) for axis in (0, 1))
    narrow = common.size(fig)[0] < 4  # the words of the colour bar take two lines
    words = 0.14 * max(title.count("\n") + 1 for title in titles) + 0.5  # title, ticks and label of a panel
    below = (
        0.75 + 0.15 * narrow + 0.15 * any(np.isnan(p.values).any() for p in panels)
    )  # the colour bar, and the legend of NaN
    cell_width = min((common.size(fig)[0] / columns - 0.5) / n_head, WIDEST)
    room = common.MAX_HEIGHT - below - words * lines
    cell_height = min(0.8 * cell_width, 0.28, max(room / lines, 0.8) / n_layer, 5.0 / n_layer)
    common.set_height(fig, lines * (n_layer * cell_height + words) + below)
    return cell_width, cell_height


def _colour_bar(fig: FigureBase, mesh: QuadMesh, axes: Sequence[Axes], scale: Scale, width: float) -> None:
    """Below all panels, so that its words have room however flat the maps are."""
    bar = fig.colorbar(mesh, ax=axes, location="bottom", aspect=width / 0.14, pad=0.02, ticks=scale.ticks, panchor="NW")
    digits = ".2f" if scale.high >= 0.1 else ".2g"  # differences may be tiny
    numbers = [f"{tick:{digits}}" for tick in scale.ticks]
    bar.ax.set_xticklabels([f"{n}\n{word}".strip() for n, word in zip(numbers, scale.words, strict=True)])
    bar.set_label(common.wrapped(scale.label, width - 0.4))
    bar.outline.set_visible(False)


def _map(ax: Axes, values: np.ndarray, scale: Scale) -> QuadMesh:
    n_layer, n_head = values.shape
    edges = {"edgecolor": "white", "linewidth": 0.4} if n_layer * n_head <= 1024 else {"edgecolor": "face"}
    mesh = ax.pcolormesh(
        np.arange(n_head + 1) - 0.5,
        np.arange(n_layer + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=scale.map,
        vmin=scale.low,
        vmax=scale.high,
        **edges,
    )
    hatched = [Rectangle((head - 0.5, layer - 0.5), 1, 1) for layer, head in np.argwhere(np.isnan(values))]
    ax.add_collection(PatchCollection(hatched, label="NaN", **common.NAN_LOOK))
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=2)
    common.integer_ticks(ax.xaxis)
    common.integer_ticks(ax.yaxis)
    ax.set_xlabel("Head")
    ax.set_ylabel("Layer (0 = input)")
    return mesh


def _annotate(ax: Axes, values: np.ndarray, scale: Scale, width: float, height: float) -> None:
    """Numbers in the cells, where there are few enough and they fit in 7 point type (about 0.06 inch a digit)."""
    digits = 2 if width > 0.32 else 1
    if max(values.shape) > ANNOTATED or width < 0.2 or height < 0.13:
        return
    colours = matplotlib.colormaps[scale.map]
    for (layer, head), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = colours((value - scale.low) / (scale.high - scale.low))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(head, layer, f"{value:.{digits}f}", ha="center", va="center", size=7, color="w" if dark else "k")


def main(argv: Sequence[str] | None = None) -> int:
    p = common.parser(__doc__)
    common.add_source(p)
    p.add_argument("--difference", action="store_true", help="each run minus the first one, at a step of both")
    return common.command(
        p,
        "entropy_heatmap",
        lambda runs, fig, a: plot(runs, fig, step=a.step, source=a.source, difference=a.difference),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Curves over training steps, one line a layer, one panel a run: what three figures have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import FigureBase

from normfree.runs import Run
from plotting import common

PANEL_HEIGHT = 1.7  # inches of the axes alone
MARKED = 64  # records: more would be marks that touch


@dataclass
class Curves:
    """`values` (records, n_layer) at `steps` (records,), and the words above the panel."""

    run: Run
    label: str
    source: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def n_layer(self) -> int:
        return self.values.shape[1]

    def rows(self, name: str) -> list[common.Row]:
        fixed = {"run": self.label, "directory": self.run.directory, "source": self.source}
        return [
            {**fixed, "step": int(self.steps[i]), "layer": layer, name: value.item()}
            for (i, layer), value in np.ndenumerate(self.values)
        ]


def up_to(run: Run, steps: np.ndarray, step: int | None) -> slice:
    """The records up to `step` (None: all), which must have been recorded."""
    return slice(0, common.index_of(run, steps, step) + 1)


def panels(fig: FigureBase, curves: Sequence[Curves], y_label: str, what: str = "batch") -> list[Axes]:
    """Empty panels with titles and axes that are shared, so that runs can be compared by eye."""
    width = common.size(fig)[0]
    columns = min(len(curves), 2 if width > 4 else 1)
    titles = [_title(c, width / columns - 0.6, what) for c in curves]
    lines = -(-len(curves) // columns)
    words = 0.14 * (1 + max(title.count("\n") for title in titles)) + 0.45
    key = 0.4 + 0.15 * any(c.n_layer > common.MANY_LAYERS for c in curves)
    common.set_height(fig, lines * (PANEL_HEIGHT + words) + key)
    axes = common.grid(fig, len(curves), columns)
    for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        ax.set_title(title)
        ax.set_xlabel("Training step")
        if i % columns == 0:
            ax.set_ylabel(common.wrapped(y_label, PANEL_HEIGHT + 0.4))
        common.integer_ticks(ax.xaxis, 6)
        if i:
            ax.sharex(axes[0])
            ax.sharey(axes[0])
    return axes


def _title(curves: Curves, inches: float, what: str) -> str:
    source = f"\n{curves.source} {what}" if curves.source else ""
    return common.wrapped(f"{curves.label}\n{common.describe(curves.run)}{source}", inches)


def deepest(curves: Sequence[Curves]) -> int:
    """Layers of the deepest run: a layer looks the same in all panels."""
    return max(c.n_layer for c in curves)


def draw(ax: Axes, curves: Curves, n_layer: int, *, held: bool = False) -> None:
    """One line a layer, dark to bright from the input to layer `n_layer` - 1; a lone record is a row of points.

    `held`: nothing is claimed between records, which are marked; a line keeps its value until the next one.
    """
    colours = common.sequential(n_layer)[: curves.n_layer]
    n = len(curves.steps)
    look: dict[str, Any] = {"marker": "o" if n == 1 or (held and n <= MARKED) else None, "ms": 2.2 if held else 3}
    drawstyle = "steps-post" if held else "default"
    for layer, colour in enumerate(colours):
        style = common.layer_style(layer, n_layer)
        line: dict[str, Any] = {"color": colour, "linestyle": style, "drawstyle": drawstyle, "label": f"layer {layer}"}
        ax.plot(curves.steps, curves.values[:, layer], **line, **look)


def key(fig: FigureBase, axes: Sequence[Axes], curves: Sequence[Curves]) -> None:
    """Which line is which layer, below the panels: a legend, or a colour bar where there are many layers."""
    n_layer = deepest(curves)
    if n_layer <= common.MANY_LAYERS:
        _legend(fig, axes, n_layer)
        return
    norm = BoundaryNorm(np.arange(n_layer + 1) - 0.5, n_layer)
    source = ScalarMappable(norm, common.layer_map(n_layer))
    ticks = np.arange(0, n_layer, -(-n_layer // 12))
    aspect = common.size(fig)[0] / 0.1
    bar = fig.colorbar(source, ax=list(axes), location="bottom", ticks=ticks, aspect=aspect, pad=0.02)
    bar.set_label("Layer (0 = input)")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _legend(fig: FigureBase, axes: Sequence[Axes], n_layer: int) -> None:
    if n_layer == 1:
        return
    drawn = [[line for line in ax.get_lines() if str(line.get_label()).startswith("layer")] for ax in axes]
    handles = max(drawn, key=len)
    columns = min(n_layer, 6 if common.size(fig)[0] > 4 else 3)
    fig.legend(handles=handles, loc="outside lower center", ncols=columns)

"""Learned negative slopes of the activations over the training steps: one line a layer, or the one global slope."""

import sys
from collections.abc import Sequence

from matplotlib.figure import FigureBase

from normfree.runs import Run
from plotting import common, layers
from plotting.layers import Curves


def plot(runs: Sequence[Run], fig: FigureBase, *, step: int | None = None) -> list[common.Row]:
    """Draw a panel a run; return a row (run, step, layer, slope) for every point."""
    curves = []
    for run, label in zip(runs, common.labels(runs), strict=True):
        steps, values = common.records(run, "act_slope", "Only runs with act=learnable_leaky_relu have learned slopes.")
        kept = layers.up_to(run, steps, step)
        curves.append(Curves(run, label, "", steps[kept], values[kept]))
    axes = layers.panels(fig, curves, "Negative slope")
    for ax, c in zip(axes, curves, strict=True):
        ax.axhline(0, color="k", linewidth=0.6, zorder=0)
        start = c.run.config.model.act_slope
        ax.axhline(start, color=common.GREY, linestyle=(0, (4, 2)), linewidth=0.8, zorder=0)
        layers.draw(ax, c, layers.deepest(curves))
        if c.n_layer == 1 < c.run.config.model.n_layer:
            ax.set_title(ax.get_title(loc="left") + "\none slope for all layers", loc="left")
        ax.margins(y=0.15)
        common.note(ax, f"start {start:g}", start)
    layers.key(fig, axes, curves)
    return [row for c in curves for row in c.rows("slope")]


def main(argv: Sequence[str] | None = None) -> int:
    p = common.parser(__doc__, step="draw the records up to this step (default: all)")
    return common.command(p, "learned_slopes", lambda runs, fig, a: plot(runs, fig, step=a.step), argv)


if __name__ == "__main__":
    sys.exit(main())

"""Mean attention entropy of each layer over the training steps, below the ceiling.

A layer's mean is over its heads that are not NaN; a cross marks the first record in which one was. Runs with a single
record (of an evaluation, say) are drawn as profiles over the layers instead.
"""

import sys
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from normfree.heads import entropy_ceiling
from normfree.runs import Run
from plotting import common, layers
from plotting.layers import Curves

Y_LABEL = "Mean attention entropy (nats)"


def plot(
    runs: Sequence[Run], fig: FigureBase, *, step: int | None = None, source: str | None = None
) -> list[common.Row]:
    """Draw a panel a run; return a row (run, step, layer, entropy, NaN heads) for every point."""
    curves, n_nan = [], []
    for run, label in zip(runs, common.labels(runs), strict=True):
        found, steps, values = common.sourced(run, "attn_entropy", source)
        kept = layers.up_to(run, steps, step)
        curves.append(Curves(run, label, found, steps[kept], mean_over_heads(values[kept])))
        n_nan.append(np.isnan(values[kept]).sum(axis=-1))
    if all(len(c.steps) == 1 for c in curves):
        _profiles(curves, fig)
    else:
        _over_steps(curves, n_nan, fig)
    rows = [row for c in curves for row in c.rows("entropy")]
    counts = np.concatenate([n.ravel() for n in n_nan])
    return [{**row, "nan_heads": int(n)} for row, n in zip(rows, counts, strict=True)]


def mean_over_heads(entropy: np.ndarray) -> np.ndarray:
    """(records, n_layer, n_head) to (records, n_layer), over the heads that are not NaN; NaN where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of the layers that are NaN throughout
        return np.nanmean(entropy.astype(np.float64), axis=-1)


def _over_steps(curves: Sequence[Curves], n_nan: Sequence[np.ndarray], fig: FigureBase) -> None:
    axes = layers.panels(fig, curves, Y_LABEL)
    longest = max(common.seq_len(c.run) for c in curves)
    for ax, c, nan_heads in zip(axes, curves, n_nan, strict=True):
        layers.draw(ax, c, layers.deepest(curves))
        _crosses(ax, c, nan_heads)
        _ceiling(ax, common.seq_len(c.run), longest)
    layers.key(fig, axes, curves)


def _crosses(ax: Axes, curves: Curves, nan_heads: np.ndarray) -> None:
    """A cross where a layer first has a NaN head: on its mean, or on its last mean where no head is left."""
    points = []
    for layer in range(curves.n_layer):
        bad = np.flatnonzero(nan_heads[:, layer])
        finite = np.flatnonzero(~np.isnan(curves.values[:, layer]))
        drawn = finite[finite <= bad[0]] if len(bad) else finite[:0]
        if len(drawn):
            points.append((curves.steps[drawn[-1]], curves.values[drawn[-1], layer]))
    if points:
        ax.plot(*zip(*points, strict=True), "x", color="k", ms=4, mew=0.9, zorder=5, label="first NaN head")
        ax.legend(handles=[ax.get_lines()[-1]], loc="lower left")


def _ceiling(ax: Axes, T: int, longest: int) -> None:
    """The dashed line no head can be above, in axes that fit the longest sequence of the figure."""
    top = entropy_ceiling(T)
    ax.axhline(top, color=common.GREY, linestyle=(0, (4, 2)), linewidth=0.8)
    common.note(ax, f"ceiling {top:.2f} (T = {T})", top)
    ax.set_ylim(0, 1.14 * entropy_ceiling(longest) or 1.0)  # T = 1: the ceiling is 0


def _profiles(curves: Sequence[Curves], fig: FigureBase) -> None:
    """Entropy against depth, one line a run."""
    common.set_height(fig, 2.4 + 0.17 * len(curves))
    ax = fig.subplots()
    for i, c in enumerate(curves):
        text = f"{c.label} ({common.describe(c.run)}), {c.source} batch, step {c.steps[0]}"
        ax.plot(
            range(c.n_layer),
            c.values[0],
            marker="o",
            ms=3,
            color=common.COLOURS[i % len(common.COLOURS)],
            linestyle=common.line_style(i),
            label=common.wrapped(text, common.size(fig)[0] - 0.7, 7),
        )
    lengths = {common.seq_len(c.run) for c in curves}
    for T in lengths:
        _ceiling(ax, T, max(lengths))
    ax.set_xlabel("Layer (0 = input)")
    ax.set_ylabel(Y_LABEL)
    common.integer_ticks(ax.xaxis)
    fig.legend(loc="outside lower center")


def main(argv: Sequence[str] | None = None) -> int:
    p = common.parser(__doc__, step="draw the records up to this step (default: all)")
    common.add_source(p)
    return common.command(
        p, "layerwise_entropy", lambda runs, fig, a: plot(runs, fig, step=a.step, source=a.source), argv
    )


if __name__ == "__main__":
    sys.exit(main())

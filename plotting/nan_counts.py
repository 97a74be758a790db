"""NaN (or Inf) counts of each layer over the training steps, and where the first one appeared.

NaN travels upwards, so a count says that the trouble began at or below its layer. `--site attn_probs` is the unit of
the original study: NaN attention probabilities per head. A mark is a record, and nothing is known of the steps between
two: the line keeps the last count until the next.
"""

import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from normfree.errors import UserError
from normfree.runs import SITES, Run
from plotting import common, layers
from plotting.layers import Curves

KINDS = {"nan": "NaN", "inf": "Inf"}
WHERE = {
    "block": "elements in each block's output",
    "attn": "elements in each attention output",
    "mlp": "elements in each feed-forward output",
    "attn_probs": "attention probabilities per head",
    "q": "elements in each layer's queries",
    "k": "elements in each layer's keys",
    "v": "elements in each layer's values",
    "mlp_hidden": "elements in each feed-forward's hidden layer",
}
HEADROOM = 1.35  # of the largest count: above it are only the words about the first one


def plot(
    runs: Sequence[Run],
    fig: FigureBase,
    *,
    step: int | None = None,
    source: str | None = None,
    site: str = "block",
    kind: str = "nan",
) -> list[common.Row]:
    """Draw a panel a run; return a row (run, step, layer, count) for every point."""
    curves = [_curves(*pair, step, source, site, kind) for pair in zip(runs, common.labels(runs), strict=True)]
    found = [c for c in curves if c.values.any()]
    axes = layers.panels(fig, curves, f"{KINDS[kind]} {WHERE[site]}", "batches")
    for ax, c in zip(axes, curves, strict=True):
        if c.values.any():
            layers.draw(ax, c, layers.deepest(curves), held=True)
            if len(c.steps) <= layers.MARKED:
                ax.set_xlabel("Training step (marks: records)")
            _first(ax, c, KINDS[kind])
        else:
            _nothing(ax, c, KINDS[kind])
    if found:
        axes[0].set_ylim(0, HEADROOM * max(c.values.max() for c in found))
        axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
        layers.key(fig, axes, curves)
    else:
        axes[0].set_ylim(0, 1)
        axes[0].set_yticks([0])
    return [row for c in curves for row in c.rows(f"{kind}_count")]


def _curves(run: Run, label: str, step: int | None, source: str | None, site: str, kind: str) -> Curves:
    found, steps, values = common.sourced(run, f"{kind}_count", source, prefer="train")
    kept = layers.up_to(run, steps, step)
    sites = SITES[: values.shape[1]]
    if (kind, site) == ("inf", "attn_probs"):
        others = ", ".join(name for name in sites if name != site)
        raise UserError(f"--kind inf --site attn_probs: a probability is never infinite. Other sites: {others}.")
    if site not in sites:
        raise UserError(f"{run.directory} did not count at {site}; it has: {', '.join(sites)}.")
    counts = values[kept, SITES.index(site)]
    if site == "attn_probs":
        counts = counts / run.config.model.n_head
    return Curves(run, label, found, steps[kept], counts)


def _first(ax: Axes, curves: Curves, kind: str) -> None:
    """Say what blew up first: the lowest layer of the first record with a count."""
    record = int(np.flatnonzero(curves.values.any(axis=1))[0])
    layer = int(np.flatnonzero(curves.values[record])[0])
    step = curves.steps[record]
    ax.axvline(step, color=common.GREY, linestyle=":", linewidth=0.8)
    text = common.wrapped(f"first {kind}: step {step}, layer {layer}", 1.1, 7)
    right = step > (curves.steps[0] + curves.steps[-1]) / 2
    ax.annotate(
        text,
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if right else 3, -2),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        size=7,
    )


def _nothing(ax: Axes, curves: Curves, kind: str) -> None:
    """No lines on the axis to be mistaken for data: say what was looked at, and that it was clean."""
    n, first, last = len(curves.steps), curves.steps[0], curves.steps[-1]
    records = f"{n} record" + ("s" if n > 1 else "")
    layers_ = f"{curves.n_layer} layer" + ("s" if curves.n_layer > 1 else "")
    steps = f"steps {first} to {last}" if n > 1 else f"step {first}"
    text = f"no {kind} in {records}\n({layers_}, {steps})"
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", size=9, color="0.25")
    ax.plot([first, last], [np.nan, np.nan])  # the range of steps, without a line
    ax.set_xlim(first - 0.5, last + 0.5)


def main(argv: Sequence[str] | None = None) -> int:
    p = common.parser(__doc__, step="draw the records up to this step (default: all)")
    common.add_source(p, "train where it was recorded, else probe")
    p.add_argument("--site", choices=SITES, default="block", help="where to count (default: block, its output)")
    p.add_argument("--kind", choices=tuple(KINDS), default="nan", help="what to count (default: nan)")
    return common.command(
        p,
        "nan_counts",
        lambda runs, fig, a: plot(runs, fig, step=a.step, source=a.source, site=a.site, kind=a.kind),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Loss over the training steps: every seed a thin line, the mean of a configuration and its 95 % interval on top.

Mean and band end where a seed of the configuration ends, so that they never become those of the survivors. A cross
stands at the step at which a run was lost, as high as its last finite value; dots lead there from that value.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from normfree.errors import UserError
from normfree.runs import Run, is_lost, lost_at
from plotting import common
from plotting.seeds import Group, group, mean_interval, trained

DEFAULT = ("train/loss", "val/loss")
UNITS = {
    "train/loss": "Training loss (nats per token)",
    "val/loss": "Validation loss (nats per token)",
    "val/perplexity": "Validation perplexity",
    "val/bits_per_byte": "Validation bits per byte",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
}
# Label of a mark -> its marker, and what the legend says: the step of the loss, or the last value where it is unknown.
CROSSES = {
    "lost": ("x", "run lost at this step (height: its last value)"),
    "last": ("+", "last value of a run that was lost"),
}


@dataclass
class Line:
    """One metric of one run, as recorded: non-finite values included."""

    run: Run
    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.values)


def plot(
    runs: Sequence[Run],
    fig: FigureBase,
    *,
    step: int | None = None,
    metrics: Sequence[str] | None = None,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> list[common.Row]:
    """Draw a panel a metric; return a row (metric, configuration, run, seed, step, value) for every point of a run.

    Without `metrics`: training and validation loss, as far as every run has them.
    """
    runs = trained(runs)
    groups = group(runs)
    metrics = metrics or [name for name in DEFAULT if all(name in run.metrics for run in runs)] or DEFAULT
    width = common.size(fig)[0]
    labels = [common.wrapped(f"{g.label} ({common.describe(g.runs[0])}), {g.count}", width - 0.7, 7) for g in groups]
    columns = 2 if width > 4 and len(metrics) > 1 else 1
    words = 0.5 + 0.14 * (2 + sum(1 + label.count("\n") for label in labels))
    common.set_height(fig, 2.1 * -(-len(metrics) // columns) + words)
    axes = common.grid(fig, len(metrics), columns)
    rows: list[common.Row] = []
    for ax, metric in zip(axes, metrics, strict=True):
        for i, g in enumerate(groups):
            lines = [_line(run, metric, step) for run in g.runs]
            _draw(ax, lines, common.COLOURS[i % len(common.COLOURS)], common.line_style(i), step)
            rows += _rows(g, metric, lines)
        _axes(ax, metric, log, limits)
    _legend(fig, axes, groups, labels)
    return rows


def _line(run: Run, metric: str, step: int | None) -> Line:
    frame = run.metrics
    if metric not in frame:
        recorded = ", ".join(name for name in frame.columns if name != "step") or "no metrics"
        raise UserError(f"{run.directory}: nothing recorded under {metric!r} (recorded: {recorded}).")
    # In the table a step without this metric and a NaN look alike. Both are left out; the status knows a lost run.
    kept = frame[frame[metric].notna()]
    steps, values = kept["step"].to_numpy(np.int64), kept[metric].to_numpy(np.float64)
    if step is not None:
        kept_to = common.index_of(run, steps, step) + 1
        steps, values = steps[:kept_to], values[:kept_to]
    return Line(run, steps, values)


def _draw(ax: Axes, lines: Sequence[Line], colour: str, style: object, until: int | None) -> None:
    alone = len(lines) == 1
    for line in lines:
        steps, values = line.steps[line.finite], line.values[line.finite]
        thin = {"linewidth": 1.1, "linestyle": style} if alone else {"linewidth": 0.5, "alpha": 0.7}
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, values, color=colour, marker=marker, ms=3, label=f"seed {line.run.config.seed}", **thin)
        if is_lost(line.run) and len(steps):
            _cross(ax, steps[-1], values[-1], lost_at(line.run), colour, until)
    if not alone:
        steps, samples = common_steps(lines)
        mean, half = mean_interval(samples)
        ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        ax.plot(steps, mean, color=colour, linestyle=style, linewidth=1.5, label="mean")


def _cross(ax: Axes, last: int, value: float, lost: int | None, colour: str, until: int | None) -> None:
    """Mark where a run was lost, which may be many steps after its last value; nothing if that is yet to come."""
    if lost is not None and until is not None and lost > until:
        return
    label = "last" if lost is None else "lost"
    at = last if lost is None else lost
    ax.plot([last, at], [value, value], ":", color=colour, linewidth=0.8)
    ax.plot(at, value, CROSSES[label][0], color=colour, ms=6, mew=1.6, zorder=5, label=label)


def common_steps(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every seed has a finite value, and those values (seeds, steps)."""
    points = [dict(zip(line.steps[line.finite], line.values[line.finite], strict=True)) for line in lines]
    steps = sorted(set.intersection(*(set(p) for p in points)))
    return np.array(steps), np.array([[p[s] for s in steps] for p in points]).reshape(len(points), len(steps))


def _rows(g: Group, metric: str, lines: Sequence[Line]) -> list[common.Row]:
    return [
        {
            "metric": metric,
            "configuration": g.label,
            "run": line.run.name,
            "directory": line.run.directory,
            "seed": line.run.config.seed,
            "status": line.run.status.get("status", "unknown"),
            "step": int(step),
            "value": float(value),
        }
        for line in lines
        for step, value in zip(line.steps, line.values, strict=True)
    ]


def _axes(ax: Axes, metric: str, log: bool, limits: tuple[float, float] | None) -> None:
    ax.set_xlabel("Training step")
    ax.set_ylabel(UNITS.get(metric, metric))
    common.integer_ticks(ax.xaxis, 6)
    if log:
        ax.set_yscale("log")
    if limits:
        ax.set_ylim(*limits)


def _legend(fig: FigureBase, axes: Sequence[Axes], groups: Sequence[Group], labels: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=common.COLOURS[i % len(common.COLOURS)], linestyle=common.line_style(i), label=label)
        for i, label in enumerate(labels)
    ]
    if any(len(g.runs) > 1 for g in groups):
        handles.append(Line2D([], [], color=common.GREY, linewidth=0.5, label="thin: one seed; band: 95 % t interval"))
    drawn = {line.get_label() for ax in axes for line in ax.get_lines()}
    for label, (marker, text) in CROSSES.items():
        if label in drawn:
            handles.append(Line2D([], [], color=common.GREY, marker=marker, linestyle="", mew=1.6, label=text))
    fig.legend(handles=handles, loc="outside lower left")


def main(argv: Sequence[str] | None = None) -> int:
    p = common.parser(__doc__, step="draw the records up to this step (default: all)")
    p.add_argument(
        "--metric",
        action="append",
        help="a column of metrics.jsonl; repeat it for more panels (default: train/loss and val/loss)",
    )
    p.add_argument("--log", action="store_true", help="logarithmic axis")
    p.add_argument("--ylim", nargs=2, type=float, metavar=("LOW", "HIGH"), help="ends of the axis")
    return common.command(
        p,
        "loss_curves",
        lambda runs, fig, a: plot(runs, fig, step=a.step, metrics=a.metric, log=a.log, limits=a.ylim),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())

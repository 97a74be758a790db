"""Share of the attention heads in each quarter of the entropy ceiling: grouped bars, one a run.

Heads from 3/4 of the ceiling ln(T!)/T on are overloaded. NaN heads are in no quarter and get a group of their own.
"""

import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from normfree.errors import UserError
from normfree.heads import RANGE_NAMES, RANGES, entropy_ceiling, range_shares
from normfree.runs import Run
from plotting import common

MAXIMA = ("ceiling", "observed", "log_t")
MOST = 14  # runs: every colour with two hatches; in narrower bars a hatch is not seen
MOST_NARROW = 7  # in one column


def plot(
    runs: Sequence[Run],
    fig: FigureBase,
    *,
    step: int | None = None,
    source: str | None = None,
    maximum: str = "ceiling",
) -> list[common.Row]:
    """Draw the bars; return a row (run, step, range, bounds in nats, heads, share) for every bar.

    `maximum`: what the quarters are of: the ceiling ln(T!)/T, the largest entropy observed in these runs, or ln T.
    """
    T = _one_seq_len(runs)
    _few_enough(runs, common.size(fig)[0])
    found = []
    for run in runs:
        name, steps, values = common.sourced(run, "attn_entropy", source)
        i = common.index_of(run, steps, step)
        found.append((name, int(steps[i]), values[i]))
    top = _maximum(maximum, T, [values for *_, values in found])
    shares = [range_shares(values, T, ceiling=top) for *_, values in found]
    with_nan = any(s.n_nan for s in shares)
    bars = np.array([[*s.shares, s.nan_share][: 5 if with_nan else 4] for s in shares])
    names = _labels(runs, [f"{name} batch, step {at}" for name, at, _ in found])
    groups = _group_names(top, with_nan, common.size(fig)[0] < 4)
    _draw(fig, bars, names, groups, top, T, maximum)
    return [
        {"run": label, "directory": run.directory, "source": name, "step": at, **row}
        for run, label, (name, at, _), bar in zip(runs, common.labels(runs), found, bars, strict=True)
        for row in _rows(bar, top, run.config.model.n_layer * run.config.model.n_head)
    ]


def _rows(bar: np.ndarray, top: float, n_head: int) -> list[common.Row]:
    """One row a bar: the range, its bounds in nats, how many of all heads, and their share."""
    bounds = [(low * top, high * top) for low, high in RANGES] + [(np.nan, np.nan)]
    rows = zip((*RANGE_NAMES, "NaN"), bounds, bar.tolist(), strict=False)  # the bar of NaN heads is optional
    return [
        {"range": name, "low": low, "high": high, "heads": round(share * n_head), "share": share}
        for name, (low, high), share in rows
    ]


def _one_seq_len(runs: Sequence[Run]) -> int:
    lengths = {common.seq_len(run): run for run in runs}
    if len(lengths) > 1:
        each = ", ".join(f"{run.name} has data.seq_len={T}" for T, run in lengths.items())
        raise UserError(f"shares of different sequence lengths are not comparable: {each}. Draw one figure for each.")
    T = next(iter(lengths))
    if T == 1:
        raise UserError("data.seq_len=1: a head that sees one token has entropy 0 of at most 0, and no range.")
    return T


def _few_enough(runs: Sequence[Run], width: float) -> None:
    most = MOST_NARROW if width < 4 else MOST
    if len(runs) > most:
        wider = f", or {MOST} with --width {common.WIDTHS[1]}" if most < MOST else ""
        raise UserError(
            f"{len(runs)} runs are too many to tell their bars apart: at most {most}{wider}. Draw several figures."
        )


def look(i: int) -> tuple[str, str]:
    """Colour and hatch of run i: when the colours are used up they come again with the next hatch."""
    n = len(common.COLOURS)
    return common.COLOURS[i % n], common.HATCHES[(i + i // n) % len(common.HATCHES)]


def _maximum(maximum: str, T: int, values: Sequence[np.ndarray]) -> float:
    if maximum == "observed":
        largest = max((float(v[~np.isnan(v)].max()) for v in values if not np.isnan(v).all()), default=0.0)
        if largest <= 0:
            raise UserError("--maximum observed: no head has an entropy above 0.")
        return largest
    return entropy_ceiling(T) if maximum == "ceiling" else float(np.log(T))


def _labels(runs: Sequence[Run], details: Sequence[str]) -> list[str]:
    pairs = zip(common.labels(runs), runs, details, strict=True)
    return [f"{label} ({common.describe(run)}), {detail}" for label, run, detail in pairs]


def _group_names(top: float, with_nan: bool, narrow: bool) -> list[str]:
    """What stands below the groups: the quarter, and its bounds in nats (on two lines where columns are narrow)."""
    to = "\nto " if narrow else " to "
    bounds = [f"{low * top:.2f}{to}{high * top:.2f}" for low, high in RANGES]
    return [f"{name}\n{nats}" for name, nats in zip(RANGE_NAMES, bounds, strict=True)] + ["NaN"] * with_nan


def _draw(
    fig: FigureBase, bars: np.ndarray, names: Sequence[str], groups: Sequence[str], top: float, T: int, maximum: str
) -> None:
    n_run, n_group = bars.shape
    width = common.size(fig)[0]
    legend = [common.wrapped(name, width - 0.7, 7) for name in names]
    common.set_height(fig, 2.5 + 0.13 * sum(1 + name.count("\n") for name in legend))
    ax = fig.subplots()
    ax.axvspan(2.5, 3.5, color="0.94", zorder=0)
    bar_width = 0.8 / n_run
    for i, (shares, name) in enumerate(zip(bars, legend, strict=True)):
        x = np.arange(n_group) + (i - (n_run - 1) / 2) * bar_width
        colour, hatch = look(i)
        ax.bar(x, 100 * shares, 0.92 * bar_width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=name)
        if bar_width * (width - 0.6) / n_group > 0.17:
            _numbers(ax, x, 100 * shares)
    ax.text(3, 0.985, "overloaded", transform=ax.get_xaxis_transform(), ha="center", va="top", size=7, color="0.3")
    ax.set_xticks(range(n_group), groups)
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, n_group - 0.5)
    ax.set_ylim(0, max(10, 1.25 * 100 * float(bars.max())))
    ax.set_yticks([t for t in ax.get_yticks() if t <= 100])
    ax.set_ylabel("Share of heads (%)")
    words = {"ceiling": "the ceiling ln(T!)/T", "observed": "the largest observed entropy", "log_t": "ln T"}[maximum]
    ax.set_xlabel(
        common.wrapped(f"Entropy as a fraction of {words} = {top:.2f} nats at T\u00a0=\u00a0{T}", width - 0.7)
    )
    fig.legend(loc="outside lower left")


def _numbers(ax: Axes, x: np.ndarray, percents: np.ndarray) -> None:
    for at, percent in zip(x, percents, strict=True):
        ax.annotate(
            f"{percent:.0f}", (at, percent), xytext=(0, 1), textcoords="offset points", ha="center", va="bottom", size=7
        )


def main(argv: Sequence[str] | None = None) -> int:
    p = common.parser(__doc__)
    common.add_source(p)
    p.add_argument(
        "--maximum",
        choices=MAXIMA,
        default="ceiling",
        help="quarters of what: ln(T!)/T, the largest entropy in these runs, or ln T (default: ceiling)",
    )
    return common.command(
        p,
        "entropy_ranges",
        lambda runs, fig, a: plot(runs, fig, step=a.step, source=a.source, maximum=a.maximum),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())

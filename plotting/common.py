"""What every figure shares: style, the command line around it, choosing records, saving, and writing the numbers.

A figure script has `plot(runs, fig, ...) -> rows`, which draws on a matplotlib Figure (or SubFigure) and returns the
plotted numbers, and `main(argv)`, the command around it. Figures have a fixed width and are never cropped, so they are
as wide in the paper as they say.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from normfree.errors import EXIT_DIRECTORY, EXIT_OK, UserError, say
from normfree.runs import Run, expand, is_lost, norm_label
from normfree.runs import labels as labels  # every script says common.labels
from plotting.places import check_files, check_format

Row = dict[str, Any]
Plot = Callable[[Sequence[Run], FigureBase, argparse.Namespace], list[Row]]

WIDTHS = (3.25, 6.75)  # inches: one column, two columns
MAX_HEIGHT = 9.0  # inches: a page; heat maps shrink their cells to fit it
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,  # long enough to tell dashes from dots
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "hatch.linewidth": 0.6,
    "axes.titlelocation": "left",
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: text stays text, editable and searchable
    "svg.fonttype": "none",
    "svg.hashsalt": "normfree",  # the same figure gives the same file
}
# Okabe and Ito's colours, told apart under the common kinds of colour blindness; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")
GREY = "0.45"
NAN_LOOK: dict[str, Any] = {"facecolor": "0.92", "edgecolor": GREY, "hatch": "//////", "linewidth": 0}
MANY_LAYERS = 8  # above this, lines are told apart by a colour bar instead of a legend


# ------------------------------------------------------------------------------------------------ the command line


def parser(description: str | None, *, step: str = "draw the record of this step (default: the last)") -> Any:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, a glob, or a folder of runs")
    p.add_argument("--step", type=int, metavar="N", help=step)
    p.add_argument("--out", type=Path, metavar="FILE", help="a .png, .svg or .pdf (default: RUN/figures/, for one run)")
    p.add_argument("--data", type=Path, metavar="FILE.csv", help="also write the plotted numbers")
    p.add_argument("--width", type=float, choices=WIDTHS, default=WIDTHS[1], help="inches (default: 6.75)")
    return p


def add_source(p: argparse.ArgumentParser, default: str = "probe where it was recorded, else train") -> None:
    p.add_argument(
        "--source",
        choices=("train", "probe"),
        help=f"the training batch, or the fixed validation probe in eval mode (default: {default})",
    )


def command(p: argparse.ArgumentParser, script: str, plot: Plot, argv: Sequence[str] | None) -> int:
    """Parse, draw, save, and say where. A user's mistake is one message and its exit code."""
    arguments = p.parse_args(argv)
    try:
        runs = expand(arguments.runs)
        runs = begun(runs)
        out = arguments.out or default_out(runs, script)
        check_files(out, arguments.data)
        with matplotlib.rc_context(STYLE):
            fig = figure(arguments.width)
            rows = plot(runs, fig, arguments)
            if arguments.data:
                write_rows(arguments.data, rows)
            save(fig, out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    say(f"{out}\n{arguments.data}" if arguments.data else str(out))
    return EXIT_OK


def begun(runs: list[Run]) -> list[Run]:
    """Those that recorded anything or were lost, the others named on stderr; all of them where there are none."""
    kept = [run for run in runs if run.array_names or len(run.metrics) or is_lost(run)]
    for run in runs if kept else ():
        if run not in kept:
            print(f"{run.directory}: stopped before its first record, left out", file=sys.stderr)
    return kept or runs


def default_out(runs: Sequence[Run], script: str) -> Path:
    """One run keeps its figures; a comparison belongs to none of its runs and goes where the user stands."""
    return runs[0].directory / "figures" / f"{script}.png" if len(runs) == 1 else Path(f"{script}.png")


# --------------------------------------------------------------------------------------------------------- files


def figure(width: float = WIDTHS[1]) -> Figure:
    """An empty figure of this width in inches; the plot sets its height."""
    return Figure(figsize=(width, 0.6 * width), layout="constrained")


def set_height(fig: FigureBase, inches: float) -> None:
    """The height a figure's content asks for. A SubFigure keeps what its owner gave it."""
    if isinstance(fig, Figure):
        fig.set_figheight(inches)


def make_room(fig: Figure) -> None:
    """Raise the figure until its titles are inside: how much room words take is known only once they are laid out."""
    for _ in range(3):
        fig.draw_without_rendering()
        box, height = fig.get_tightbbox(), fig.get_figheight()
        missing = max(0.0, box.y1 - height) + max(0.0, -box.y0)
        if missing < 0.01:
            return
        fig.set_figheight(height + missing + 0.03)


def size(fig: FigureBase) -> tuple[float, float]:
    """Width and height in inches, of a SubFigure too."""
    box = fig.bbox.bounds  # type: ignore[attr-defined]
    dpi = fig.dpi  # type: ignore[attr-defined]
    return box[2] / dpi, box[3] / dpi


def save(fig: Figure, out: Path) -> None:
    """Write the figure under the fixed width, text kept as text, without a date (equal figures are equal files)."""
    check_format(out)
    kind = out.suffix.lstrip(".").lower()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            make_room(fig)
            fig.savefig(out, format=kind, metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", EXIT_DIRECTORY) from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The plotted numbers as CSV, one row a number drawn, in full precision."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}", EXIT_DIRECTORY) from error


# ------------------------------------------------------------------------------------------------------- records


def records(
    run: Run, name: str, remedy: str = "diagnostics.every sets how often a run records."
) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of an array, or an error that says what to do where it was not recorded."""
    if name in run.array_names:
        steps, values = run.array(name)
        if len(steps):
            return steps, values
    recorded = ", ".join(run.array_names) or "no arrays"
    raise UserError(f"{run.directory}: nothing recorded under {name!r} (recorded: {recorded}). {remedy}")


def sourced(run: Run, name: str, source: str | None, *, prefer: str = "probe") -> tuple[str, np.ndarray, np.ndarray]:
    """(source, steps, values) of a statistic, of the training batch or the probe; by default the preferred one."""
    names = {"train": name, "probe": f"probe_{name}"}
    if source is None:
        other = "train" if prefer == "probe" else "probe"
        source = other if names[prefer] not in run.array_names and names[other] in run.array_names else prefer
    return source, *records(run, names[source])


def index_of(run: Run, steps: np.ndarray, step: int | None) -> int:
    """Index of the record of `step` (None: the last), or an error that names the nearest recorded steps."""
    if step is None:
        return len(steps) - 1
    found = np.flatnonzero(steps == step)
    if not len(found):
        before, after = steps[steps < step], steps[steps > step]
        nearest = [str(s) for s in (*before[-1:], *after[:1])]
        raise UserError(f"{run.directory} has no record at step {step}; nearest: {' and '.join(nearest)}.")
    return int(found[-1])


def listed(steps: np.ndarray, most: int = 12) -> str:
    """Steps in words: all of them, or the first and the last of many."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= most else [*shown[: most // 2], "...", *shown[-(most // 2) :]])


def seq_len(run: Run) -> int:
    """T, the tokens of a training sequence; it sets the ceiling of the entropies."""
    data, model = run.config.data, run.config.model
    return data.seq_len if data.seq_len is not None else min(model.block_size, 128)


# -------------------------------------------------------------------------------------------------- words and looks


def describe(run: Run) -> str:
    return norm_label(run.config)


def wrapped(text: str, inches: float, points: float = 8) -> str:
    """Break a title so that it fits a panel (a character is about 0.54 of the type size wide)."""
    import textwrap

    room = max(12, int(inches * 72 / (0.54 * points)))
    lines = [textwrap.wrap(line, room, break_on_hyphens=True) or [""] for line in text.split("\n")]
    return "\n".join(part for line in lines for part in line)


def sequential(n: int, name: str = "viridis") -> list[tuple[float, ...]]:
    """n colours from dark to bright in the order of the layers; the palest tenth is left out, for white paper."""
    return [tuple(c) for c in matplotlib.colormaps[name](np.linspace(0, 0.9, n) if n > 1 else [0.0])]


def layer_map(n: int) -> Colormap:
    return ListedColormap(sequential(n))


def line_style(i: int) -> Any:
    return LINES[i % len(LINES)]


def layer_style(layer: int, n_layer: int) -> Any:
    """Few layers: a style each. Many: a style for each quarter of the depth, which the eye can still follow."""
    return line_style(layer if n_layer <= MANY_LAYERS else len(LINES) * layer // n_layer)


def integer_ticks(axis: Any, most: int = 12) -> None:
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def note(ax: Axes, text: str, y: float) -> None:
    """Small words on top of a horizontal line, at the right end."""
    at = ("axes fraction", "data")
    ax.annotate(text, (1, y), xycoords=at, xytext=(0, 2), textcoords="offset points", ha="right", size=7)


def grid(fig: FigureBase, n: int, columns: int) -> list[Axes]:
    """n panels in reading order, at most `columns` side by side."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    axes = fig.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[n:]:
        spare.remove()
    return axes[:n]


def nan_legend(text: str = "NaN") -> Patch:
    return Patch(label=text, **NAN_LOOK)

"""The figures of rung B: spread of pre-activations by layer, and heads that have left the ceiling over steps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from plotting import common
from revival import words
from revival.figures import draw, stem
from revival.records import Record, is_lost, numbers
from revival.trace import LEFT
from revival.view import FOUR, View

COLUMNS = 4
WIDTH = common.WIDTHS[1]  # inches
Plot = Callable[[Axes, Sequence[Record]], None]


def mechanism(view: View, rung: str, folder: Path) -> dict[str, Path]:
    """A panel an arm: spread by layer at the first and the last step, and share of heads that have left."""
    if rung != "B":
        return {}
    arms = [("A", arm) for arm in FOUR] + [("B", arm) for arm in view.arms("B")]
    found = {arm: view.own(source, arm) for source, arm in arms}
    found = {arm: records for arm, records in found.items() if any(map(_measured, records))}
    if not found:
        return {}

    height = 0.6 + 1.6 * -(-len(found) // COLUMNS)

    def spread(fig: Figure) -> None:
        common.set_height(fig, height + 0.3)
        _panels(fig, found, _spread, "std of pre-activations")
        _same_scale(fig.axes)
        fig.legend(handles=fig.axes[0].get_lines()[:2], loc="outside lower center", ncols=2)

    def left(fig: Figure) -> None:
        common.set_height(fig, height)
        _panels(fig, found, _left, f"heads below {LEFT:g}\nof the ceiling (%)")

    return {
        "spread": draw(folder / f"{stem(view, rung)}_spread.png", spread),
        "left": draw(folder / f"{stem(view, rung)}_left.png", left),
    }


def _measured(record: Record) -> bool:
    return not is_lost(record) and "pre_activation_std" in record and "left_ceiling" in record


def _panels(fig: FigureBase, found: dict[str, list[Record]], plot: Plot, label: str) -> None:
    """One panel an arm, all of one height."""
    columns = min(COLUMNS, len(found))
    axes = common.grid(fig, len(found), columns)
    for i, (ax, (arm, records)) in enumerate(zip(axes, found.items(), strict=True)):
        if i:
            ax.sharey(axes[0])  # before it is drawn: shared limits then hold the lines of all panels
        plot(ax, [r for r in records if _measured(r)])
        gone = sum(map(is_lost, records))
        title = common.wrapped(words.arm_words(arm), WIDTH / columns - 0.4)
        ax.set_title(f"{title}\n{gone} of {len(records)} lost")
        if i % columns == 0:
            ax.set_ylabel(label)


def _spread(ax: Axes, records: Sequence[Record]) -> None:
    """A thin line a run, first step dashed, last step solid."""
    for record in records:
        std = numbers(record["pre_activation_std"])
        for i, (name, style) in enumerate((("first step", "--"), ("last step", "-"))):
            layers = np.arange(std.shape[1])
            ax.plot(layers, std[-i], style, color=common.COLOURS[i], linewidth=0.9, alpha=0.7, label=name)
    ax.set_yscale("log")
    ax.set_xticks(layers)
    ax.set_xlabel("Layer")


def _same_scale(axes: Sequence[Axes]) -> None:
    """A run whose numbers grew out of all measure leaves the others their scale; how far it goes is said."""
    ends = [[float(np.max(line.get_ydata())) for line in ax.get_lines()] for ax in axes]
    every = [end for panel in ends for end in panel]
    limit = 1e4 * float(np.median(every))
    if max(every) <= limit:
        return
    lowest = min(float(np.min(line.get_ydata())) for ax in axes for line in ax.get_lines())
    axes[0].set_ylim(lowest / 2, 2 * max(end for end in every if end <= limit))
    for ax, panel in zip(axes, ends, strict=True):
        if max(panel) > limit:
            note = f"up to {words.rate_name(float(f'{max(panel):.0e}'))}"
            ax.annotate(note, (0.97, 0.03), xycoords="axes fraction", ha="right", size=7)


def _left(ax: Axes, records: Sequence[Record]) -> None:
    """A line a run: it rises by a head's share at the step at which that head is first seen below."""
    for record in records:
        heads = [step for layer in record["left_ceiling"] for step in layer]
        steps = sorted(step for step in heads if step is not None)
        share = 100 * np.arange(1, len(steps) + 1) / len(heads)
        ends = [0, *steps, record["last_step"]]
        ax.step(
            ends,
            [0, *share, share[-1] if steps else 0],
            where="post",
            color=common.COLOURS[0],
            linewidth=0.9,
            alpha=0.7,
        )
    ax.set_ylim(-3, 103)
    ax.set_xlabel("Step")

"""Loss against peak learning rate: what the tuning runs of a rung came to."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plotting import common
from revival import words
from revival.cells import TUNING_SEED
from revival.figures import WIDE, draw, stem
from revival.view import FAR, FOUR, View, base_of

Line = Mapping[float, float]  # rate -> loss, infinite where the run was lost


def loss_against_rate(view: View, rung: str, folder: Path) -> dict[str, Path]:
    """One line an arm. Runs that were lost are crosses at the top, runs that hardly learned are triangles, so that the
    others keep their scale. Many arms have a panel for each of the four that they were made of, with that one's line of
    rung A in grey.
    """
    tried = {arm: found for arm in view.arms(rung) if (found := view.tuning(rung, arm))}
    if all(len(found) < 2 for found in tried.values()):
        return {}
    many = len(tried) > len(FOUR)
    panels: dict[str, list[tuple[str, str, Line]]] = {}  # base -> name, colour and losses of each line
    for arm, found in tried.items():
        base = base_of(arm) if many else ""
        lines = panels.setdefault(base, [])
        if base and not lines and (before := view.tuning("A", base)):
            lines.append((f"{words.arm_words(base)} (rung A)", common.GREY, before))
        coloured = sum(colour != common.GREY for _, colour, _ in lines)
        lines.append((words.arm_words(arm), common.COLOURS[coloured % len(common.COLOURS)], found))
    drawn = [loss for lines in panels.values() for _, _, found in lines for loss in found.values()]
    limit = 2 * FAR + min(filter(math.isfinite, drawn), default=0.0)
    inside = [loss for loss in drawn if loss <= limit]
    room = 0.06 * (max(inside, default=1.0) - min(inside, default=0.0) or 1.0)
    edge = max(inside, default=1.0) + room  # above it are marks, not losses

    def plot(fig: Figure) -> None:
        common.set_height(fig, 3.2 + 0.14 * max(map(len, panels.values())))
        axes = common.grid(fig, len(panels), len(panels))
        for ax, lines in zip(axes, panels.values(), strict=True):
            if ax is not axes[0]:
                ax.sharey(axes[0])
            marks: Counter[float] = Counter()  # rate -> how many there are already: they stand above one another
            for i, (name, colour, found) in enumerate(lines):
                style = {"color": colour, "linestyle": common.line_style(i)}
                _line(ax, name, found, limit, edge, room, marks, style)
            _finish(ax, sorted({lr for _, _, found in lines for lr in found}))
        axes[0].set_ylabel(f"Validation loss, seed {TUNING_SEED} (nats per token)")
        if len(inside) < len(drawn):
            axes[0].set_yticks([tick for tick in axes[0].get_yticks() if inside and min(inside) - room < tick < edge])
            for ax in axes:
                ax.axhline(edge, color="0.8", linewidth=0.6, linestyle=":")
        for ax in axes if many else ():
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
        names = [] if many else axes[0].get_legend_handles_labels()[0]
        fig.legend(handles=names + _marks(drawn, limit), loc="outside lower left", ncols=2)

    return {"rates": draw(folder / f"{stem(view, rung)}_rates.png", plot, WIDE if many else common.WIDTHS[1])}


def _line(
    ax: Axes,
    label: str,
    found: Line,
    limit: float,
    edge: float,
    room: float,
    marks: Counter[float],
    style: Mapping[str, Any],
) -> None:
    """Losses up to `limit`; what is beyond has a mark above `edge`, a `room` above the last one at that rate."""
    kept = {lr: loss for lr, loss in found.items() if loss <= limit}
    ax.plot(list(kept), list(kept.values()), label=label, marker="o", ms=3, **style)
    for lr, loss in found.items():
        if loss > limit:
            mark = "^" if math.isfinite(loss) else "x"
            marks[lr] += 1
            ax.plot(lr, edge + room * marks[lr], mark, color=style["color"], ms=4, mew=1.2)


def _marks(losses: list[float], limit: float) -> list[Line2D]:
    """What the marks at the top mean, of those that there are."""
    above = [loss for loss in losses if limit < loss < math.inf]
    found = {"^": f"ended at {min(above):.1f} to {max(above):.1f}"} if above else {}
    found |= {"x": "lost at this rate"} if math.inf in losses else {}
    return [Line2D([], [], color=common.GREY, marker=mark, ls="", ms=4, label=text) for mark, text in found.items()]


def _finish(ax: Axes, ladder: list[float]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(ladder, [words.rate_name(lr) for lr in ladder])
    ax.minorticks_off()
    ax.set_xlabel("Peak learning rate")

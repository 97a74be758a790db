"""Loss against peak learning rate: what the tuning runs of a rung came to."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plotting import common
from revival import words
from revival.figures import WIDE, draw, stem
from revival.view import FOUR, View, base_of

Line = Mapping[float, float]  # rate -> loss, infinite where the run was lost


def loss_against_rate(view: View, rung: str, folder: Path) -> dict[str, Path]:
    """One line an arm; a lost run is a cross at the top. Many arms have a panel for each of the four that they were
    made of, with that one's line of rung A in grey.
    """
    tried = {arm: found for arm in view.arms(rung) if (found := view.tuning(rung, arm))}
    if all(len(found) < 2 for found in tried.values()):
        return {}
    many = len(tried) > len(FOUR)
    panels: dict[str, dict[str, Line]] = {}
    for arm, found in tried.items():
        panels.setdefault(base_of(arm) if many else "", {})[arm] = found
    losses = [loss for found in tried.values() for loss in found.values()]
    finite = [loss for loss in losses if math.isfinite(loss)]
    top = max(finite, default=1.0) + 0.06 * (max(finite, default=1.0) - min(finite, default=0.0) or 1.0)

    def plot(fig: Figure) -> None:
        common.set_height(fig, 3.2 + 0.14 * max(map(len, panels.values())))
        axes = common.grid(fig, len(panels), len(panels))
        for ax, (base, arms) in zip(axes, panels.items(), strict=True):
            if ax is not axes[0]:
                ax.sharey(axes[0])
            before = view.tuning("A", base) if base else {}
            if before:
                _line(ax, f"{words.arm_words(base)} (rung A)", before, top, 0, color=common.GREY)
            for i, (arm, found) in enumerate(arms.items()):
                colour = common.COLOURS[i % len(common.COLOURS)]
                _line(ax, words.arm_words(arm), found, top, i, color=colour, linestyle=common.line_style(i))
            _finish(ax, sorted({lr for found in (*arms.values(), before) for lr in found}))
        if not all(map(math.isfinite, losses)):
            axes[0].plot([], [], "x", color=common.GREY, ms=6, mew=1.6, label="lost at this rate")
        if not finite:
            axes[0].set_yticks([])  # there are crosses alone, at no loss
        axes[0].set_ylabel("Validation loss (nats per token)")
        for ax in axes if many else ():
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
        if not many:
            fig.legend(loc="outside lower left", ncols=2)

    return {"rates": draw(folder / f"{stem(view, rung)}_rates.png", plot, WIDE if many else common.WIDTHS[1])}


def _line(ax: Axes, label: str, found: Line, top: float, place: int, **style: Any) -> None:
    """`place`: of this line among the others; crosses at one rate stand side by side."""
    kept = {lr: loss for lr, loss in found.items() if math.isfinite(loss)}
    ax.plot(list(kept), list(kept.values()), label=label, marker="o", ms=3, **style)
    gone = [lr * 1.06**place for lr in found if lr not in kept]
    ax.plot(gone, [top] * len(gone), "x", color=style["color"], ms=6, mew=1.6)


def _finish(ax: Axes, ladder: list[float]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(ladder, [words.rate_name(lr) for lr in ladder])
    ax.minorticks_off()
    ax.set_xlabel("Peak learning rate")

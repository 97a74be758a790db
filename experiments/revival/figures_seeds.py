"""Every seed's loss, arm by arm."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plotting import common
from revival import words
from revival.figures import draw, stem
from revival.records import Record, is_lost
from revival.verdicts_scale import BOTH, CONTROL, GELU_ONLY
from revival.view import FOUR, View, base_of, far_off, values

# Rung B: ReLU beside GELU at each scale, below what was changed.
PAIRED = [("A", "relu"), ("A", "gelu")]
PAIRED += [("B", f"{base}{change}") for change in BOTH for base in ("relu", "gelu")]
PAIRED += [("B", f"gelu{change}") for change in GELU_ONLY] + [("A", "ln+gelu"), ("B", CONTROL)]


def seeds(view: View, rung: str, folder: Path) -> dict[str, Path]:
    """Each at its arm's own rate, of rung B beside rung A's. Lost runs are crosses; runs that are far off are arrows
    with their loss, so that the others keep their scale.
    """
    arms = PAIRED if rung == "B" else [(rung, arm) for arm in view.arms(rung)]
    found = {arm: records for source, arm in arms if (records := view.own(source, arm))}
    kept = {arm: {s: x for s, x in values(r).items() if s not in far_off(r)} for arm, r in found.items()}
    losses = [loss for nats in kept.values() for loss in nats.values()]
    if not losses:
        return {}
    lowest, highest = min(losses), max(losses)
    room = 0.06 * (highest - lowest or 1.0)

    def plot(fig: Figure) -> None:
        common.set_height(fig, 0.9 + 0.26 * len(found))
        ax = fig.subplots()
        for i, (arm, records) in enumerate(found.items()):
            colour = common.COLOURS[FOUR.index(base_of(arm))] if base_of(arm) else common.GREY
            ax.plot(list(kept[arm].values()), [i] * len(kept[arm]), "o", color=colour, ms=4, alpha=0.6)
            _beyond(ax, records, highest + room, room, i, colour)
        ax.set_xlim(lowest - room, highest + 4 * room)
        ax.set_yticks(range(len(found)), [words.arm_words(arm) for arm in found])
        ax.invert_yaxis()
        ax.grid(axis="x", color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
        marks = "\u00d7 a lost run, \u25b6 one that is far off"
        ax.set_xlabel(f"Validation loss (nats per token): one point per seed, {marks}")

    return {"seeds": draw(folder / f"{stem(view, rung)}_seeds.png", plot)}


def _beyond(ax: Axes, records: list[Record], right: float, step: float, place: int, colour: str) -> None:
    """Right of the points: what has no place among them."""
    for loss in far_off(records).values():
        ax.plot(right, place, ">", color=colour, ms=5)
        ax.annotate(f"{loss:.2f}", (right, place), xytext=(5, 0), textcoords="offset points", va="center", size=7)
        right += 1.5 * step
    gone = sum(map(is_lost, records))
    ax.plot([right + 0.5 * step * j for j in range(gone)], [place] * gone, "x", color=colour, ms=5)

"""The study at a glance: the tables that its page begins with, of which the README quotes the first."""

from collections.abc import Sequence

from revival import words
from revival.cases import CASES, about, own_rate, points, shares
from revival.cells import TUNING_SEED
from revival.records import Record
from revival.verdicts import PAIRS, PUBLISHED_GAP
from revival.verdicts_scale import BOTH, GELU_ONLY, at_rate
from revival.view import FOUR, View

Arm = tuple[str, str]  # rung, arm
Runs = dict[str, Sequence[Record]]  # arm -> its reported runs


def at_a_glance(view: View) -> list[str]:
    """A table for each comparison of the four arms that has a reported run, and one of what was done to the scale."""
    lines = []
    for rung, prefix, published in CASES:
        own = {arm: view.own(rung, prefix + arm) for arm in FOUR}
        if any(own.values()):
            lines += [*_table(view, rung, prefix, own, PUBLISHED_GAP[published]), ""]
    if any(view.own("B", arm) for arm in view.arms("B")):
        lines += [*_scale(view), ""]
    return lines


def _table(view: View, rung: str, prefix: str, own: Runs, published: dict[str, float]) -> list[str]:
    """A row an arm, then ReLU - GELU without and with norms; at the common rate too, where all arms were run at it."""
    tuned = any(view.tuning(rung, prefix + arm) for arm in FOUR)
    columns = [
        about(rung, prefix),
        "lost",
        f"best rate, seed {TUNING_SEED}" if tuned else "rate",
        "loss there",
        "overloaded heads (%)",
    ]
    blocks = [own]
    common = view.common_rate(rung, [prefix + arm for arm in FOUR])
    at_common = {} if common is None else {arm: view.reported(rung, prefix + arm, common) for arm in FOUR}
    if common is not None and all(at_common.values()):
        blocks.append(at_common)
        rate = words.rate_name(common)
        columns += [f"lost at {rate}", f"loss at {rate}", f"overloaded heads at {rate} (%)"]
    rows = []
    for arm in FOUR:
        row = [words.arm_words(arm), words.lost_words(own[arm]), own_rate(view, rung, prefix + arm), *_levels(own[arm])]
        for block in blocks[1:]:
            row += [words.lost_words(block[arm]), *_levels(block[arm])]
        rows.append(row)
    for name, norm, one, other in PAIRS:
        row = [f"ReLU {words.MINUS} GELU {name[0].lower()}{name[1:]} (published: {words.signed(published[norm], 3)})"]
        for i, block in enumerate(blocks):
            pair = block[one], block[other]
            row += [""] if i else ["", ""]
            row += [words.interval(view.gap(*pair), 3), words.interval(points(view.gap(*pair, "overload")), 0)]
        rows.append(row)
    return words.table(columns, rows)


def _scale(view: View) -> list[str]:
    """Rung B: a row for each way to change the scale without norms, after rung A's as it is."""
    gap, common = f"ReLU {words.MINUS} GELU", view.common_rate("A")
    columns = ["Without block norms, at best rates", "lost, ReLU", "lost, GELU", "loss, ReLU", "loss, GELU", gap]
    columns += ["overloaded heads, ReLU (%)", "overloaded heads, GELU (%)"]
    if common is not None:
        columns.append(f"{gap} at {words.rate_name(common)}; of seed {TUNING_SEED}, on the tokens that choose rates")
    rows = [_compared(view, "nothing else changed (rung A)", ("A", "relu"), ("A", "gelu"), common)]
    for change in (*BOTH, *GELU_ONLY):
        relu = ("A", "relu") if change in GELU_ONLY else ("B", f"relu{change}")
        rows.append(_compared(view, words.change_words(change), relu, ("B", f"gelu{change}"), common))
    return words.table(columns, rows)


def _compared(view: View, name: str, relu: Arm, gelu: Arm, common: float | None) -> list[str]:
    one, other = view.own(*relu), view.own(*gelu)
    lost = [words.lost_words(records) for records in (one, other)]
    (loss, heads), (other_loss, other_heads) = _levels(one), _levels(other)
    gap = view.gap(one, other)
    told = words.interval(gap, 3) + (" preliminary" if gap and gap.preliminary else "")
    row = [name, *lost, loss, other_loss, told, heads, other_heads]
    if common is None:
        return row
    seeds = view.gap(*(view.reported(*arm, common) for arm in (relu, gelu)))
    if seeds:
        return [*row, words.interval(seeds, 3)]
    alone = at_rate(view, common, relu, gelu)
    return [*row, words.DASH if alone is None else f"{words.signed(alone, 3)} (seed {TUNING_SEED})"]


def _levels(records: Sequence[Record]) -> list[str]:
    """Loss and percent of overloaded heads."""
    return [words.losses(records, 3), shares(records, "overload", 0)]

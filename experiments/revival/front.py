"""The study at a glance: the tables that its page begins with, of which the README quotes the first."""

from collections.abc import Sequence

from revival import words
from revival.cases import CASES, about, points
from revival.records import Record
from revival.verdicts import PUBLISHED_GAP
from revival.view import FOUR, View, overload, values

PAIRS = (
    ("ReLU \u2212 GELU, no block norms", "none", "relu", "gelu"),
    ("ReLU \u2212 GELU, LayerNorm", "norms", "ln+relu", "ln+gelu"),
)
Runs = dict[str, Sequence[Record]]  # arm -> its reported runs


def at_a_glance(view: View) -> list[str]:
    """A table for each comparison of the four arms that has a reported run."""
    lines = []
    for rung, prefix, published in CASES:
        own: Runs = {arm: view.own(rung, prefix + arm) for arm in FOUR}
        if any(own.values()):
            gaps = PUBLISHED_GAP[published]
            lines += [*_table(view, rung, own, gaps, about(rung, prefix), not prefix), ""]
    return lines


def _table(view: View, rung: str, own: Runs, published: dict[str, float], title: str, tuned_here: bool) -> list[str]:
    """A row an arm, then ReLU - GELU without and with norms; where the rung chose rates, at the common one as well."""
    blocks = [own]
    columns = [title, "lost", "best rate", "loss there", "overloaded heads (%)"]
    common = view.common_rate(rung) if tuned_here else None
    if common is not None:
        blocks.append({arm: view.reported(rung, arm, common) for arm in FOUR})
        columns += [f"loss at {words.rate_name(common)}", "overloaded (%)"]
    rows = []
    for arm in FOUR:
        runs = [block[arm] for block in blocks]
        rate = words.rate_name(own[arm][0]["lr"]) if own[arm] else words.DASH
        row = [words.arm_words(arm), "; ".join(dict.fromkeys(map(words.lost_words, runs))), rate]
        for records in runs:
            row += [words.mean(values(records), 3), words.mean(overload(records), 0, 100)]
        rows.append(row)
    for name, norm, one, other in PAIRS:
        row = [f"{name} (published: {words.signed(published[norm], 3)})", "", ""]
        for block in blocks:
            pair = block[one], block[other]
            row += [words.interval(view.gap(*pair), 3), words.interval(points(view.gap(*pair, "overload")), 0)]
        rows.append(row)
    return words.table(columns, rows)

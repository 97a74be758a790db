"""The four-arm comparisons of the study, and phrases that its verdicts share."""

from collections.abc import Sequence

from revival import words
from revival.records import Record
from revival.statistics import Difference
from revival.view import View

CASES = (("A", "", "Pythia-70M, T = 128"), ("C", "faithful:", "GPT-2 124M, T = 128"),
         ("C", "tuned:", "GPT-2 124M, T = 128"), ("G", "t256:", "Pythia-70M, T = 256"))  # fmt: skip
ABOUT = {
    "A": "Pythia-70M's dimensions, T = 128",
    "C": "GPT-2 124M, T = 128",
    "G": "Pythia-70M's dimensions, T = 256, at the rates of T = 128",
}


def about(rung: str, prefix: str) -> str:
    more = {"faithful:": ", the published schedule's first tenth", "tuned:": ", rates tuned at this length"}
    return ABOUT[rung] + more.get(prefix, "")


def tokens_of(records: Sequence[Record]) -> str:
    first = records[0]
    text = f"{words.millions(first['planned_tokens'])} tokens"
    return text + (" of 2.1 billion" if first["planned_tokens"] < 2.1e9 else "")


def preliminary(gap: Difference) -> str:
    return "Preliminary: " if gap.preliminary else ""


def lost_of(**arms: Sequence[Record]) -> str:
    return "lost: " + ", ".join(f"{name} {words.lost_words(records)}" for name, records in arms.items())


def quarters(view: View, ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """The mean gap at 25, 50 and 100 % of the run, on the trainer's own tokens."""
    gaps = {name: view.gap(ours, theirs, name) for name in ("25", "50", "100")}
    return ", ".join(f"{words.signed(gap.mean) if gap else 'none'} at {name} %" for name, gap in gaps.items())

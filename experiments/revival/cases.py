"""The four-arm comparisons of the study, and phrases that its verdicts share."""

from collections.abc import Sequence

from revival import words
from revival.cells import TUNING_SEED
from revival.records import Record
from revival.statistics import Difference, difference
from revival.view import FAR, QUARTERS, View, far_off, unlike, values

CASES = (
    ("A", "", "Pythia-70M, T = 128"),
    ("A2", "", "Pythia-70M, T = 128"),
    ("A3", "warmup:", "Pythia-70M, T = 128"),
    ("C", "faithful_prefix:", "GPT-2 124M, T = 128"),
    ("C", "faithful:", "GPT-2 124M, T = 128"),  # at scale full
    ("C", "tuned:", "GPT-2 124M, T = 128"),
    ("G", "t256:", "Pythia-70M, T = 256"),
)  # rung, prefix of its arms, the published model it is put beside
ABOUT = {
    "A": "Pythia-70M's dimensions, T = 128",
    "A2": "Pythia-70M's dimensions, T = 128, rates in steps of \u221a2 (added after rung A was seen)",
    "A3": "Pythia-70M's dimensions, T = 128",
    "C": "GPT-2's dimensions, T = 128",
    "G": "Pythia-70M's dimensions, T = 256, at the rates of T = 128",
}


def about(rung: str, prefix: str) -> str:
    more = {
        "faithful_prefix:": ", the published schedule's first tenth",
        "faithful:": ", the published schedule",
        "warmup:": ", half of the run as warm-up (added after rungs A to C were seen)",
        "tuned:": ", rates tuned at rung A's length",
    }
    return ABOUT[rung] + more.get(prefix, "")


def tokens_of(records: Sequence[Record]) -> str:
    """52.4 million tokens (0.53 epochs of 99.1 million)"""
    first = records[0]
    text = f"{words.millions(first['planned_tokens'])} tokens"
    return f"{text} ({first['epochs']:.2f} epochs of {words.millions(first['unique_tokens'])})"


def preliminary(*gaps: Difference | None) -> str:
    """Where one of them has fewer seeds than a verdict needs."""
    return "Preliminary: " if any(gap is None or gap.preliminary for gap in gaps) else ""


def lost_of(**arms: Sequence[Record]) -> str:
    """lost: 0 of 5 (0 to 52 %) each"""
    found = {name: words.lost_words(records) for name, records in arms.items() if records}
    if len(found) == len(arms) > 1 and len(set(found.values())) == 1:
        return f"lost: {next(iter(found.values()))} each"
    return "lost: " + ", ".join(f"{name} {text}" for name, text in found.items())


def own_rate(view: View, rung: str, arm: str) -> str:
    """An arm's own rate, for a table: 2e-3"""
    rate = view.own_rate(rung, arm)
    if rate is None or (len(view.tuning(rung, arm)) == 1 and not view.own(rung, arm)):
        return "not chosen yet"
    return words.rate_name(rate) + ("" if view.is_settled(rung, arm) else " (at the end of the ladder)")


def absent(view: View, rung: str, arm: str) -> str:
    """Why an arm has no reported run."""
    tried = view.tuning(rung, arm)
    if not tried:
        return "not run"
    if view.own_rate(rung, arm) is None:
        return f"lost at each of the {len(tried)} rates tried"
    return "no reported run (its rate is not chosen yet, or was not run)"


def not_there(view: View, **arms: tuple[str, str]) -> str:
    """`name`: (rung, arm). What is missing of arms that a sentence needs; empty where every one has a run."""
    found = {name: view.own(*arm) for name, arm in arms.items()}
    if all(found.values()):
        return ""
    if not any(view.arms(rung).count(arm) for rung, arm in arms.values()):
        return "not run"
    parts = [f"{name}: {absent(view, *arms[name])}" for name, records in found.items() if not records]
    return "; ".join(parts + ([lost_of(**found)] if any(found.values()) else []))


def unsettled(view: View, **arms: tuple[str, str]) -> str:
    """`name`: (rung, arm). Which optima have no worse rate on both sides, for the end of a sentence."""
    names = [name for name, arm in arms.items() if not view.is_settled(*arm)]
    if not names:
        return ""
    if len(names) == 1:
        return f"; the optimum of {names[0]} is at the end of its ladder, so that its rate is not settled"
    return (
        f"; the optima of {' and '.join(names)} are at the ends of their ladders, so that their rates are not settled"
    )


def spread(view: View, **arms: tuple[str, str]) -> str:
    """`name`: (rung, arm). How far each arm's seeds lie apart, for the end of a sentence."""
    nats = {name: values(view.own(*arm)).values() for name, arm in arms.items()}
    found = [f"{name}'s by {max(losses) - min(losses):.3f}" for name, losses in nats.items() if len(losses) > 1]
    return f"; seeds differ: {', '.join(found)}" if found else ""


def next_rates(view: View, **arms: tuple[str, str]) -> str:
    """`name`: (rung, arm). Which arms fail at the next rate up, for the end of a sentence."""
    failed = []
    for name, arm in arms.items():
        tried, best = view.tuning(*arm), view.own_rate(*arm)
        above = min((lr for lr in tried if best is not None and lr > best), default=None)
        if above is not None and tried[above] > tried[best] + FAR:
            failed.append(f"{name} at {words.rate_name(above)}")
    if not failed:
        return ""
    told = f"; at the next rate up seed {TUNING_SEED} fails ({', '.join(failed)})"
    return f"{told}: what lies between may matter, and so may the warm-up"


def warm_up(records: Sequence[Record]) -> str:
    """How many of a run's steps, for the end of a phrase; empty where that is the recipe's own."""
    steps = _given(records[0], "optim.warmup_steps")
    return "" if steps is None else f", warm-up {steps:,.0f} of {records[0]['steps']:,} steps"


def decayed(records: Sequence[Record]) -> str:
    """What is published is of a run whose rate came down to the end; here, where it did not, that is said."""
    final = _given(records[0], "optim.lr_final")
    return "" if final is None or final < 0.5 else ", at the end of its decay, where these runs have hardly begun it"


def _given(record: Record, key: str) -> float | None:
    """A number among the settings that a cell names."""
    found = [word.partition("=")[2] for word in record["words"] if word.startswith(f"{key}=")]
    return float(found[0]) if found else None


def not_paired(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """The seeds that are left out of a pair of arms because their runs are not alike, for the end of a sentence."""
    seeds = unlike(ours, theirs)
    if not seeds:
        return ""
    return f"; not paired, as their runs differ in planned or evaluated tokens: seeds {', '.join(map(str, seeds))}"


def quarters(view: View, ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """The mean gap at 25, 50 and 100 % of the run, on the trainer's own tokens."""
    gaps = [view.gap(ours, theirs, name) for name in QUARTERS]
    shown = ", ".join(words.signed(gap.mean) if gap else "none" for gap in gaps)
    return f"at {', '.join(QUARTERS)} % of the run {shown}"


def splits(view: View, ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """The difference on val and on val_package, and a word where the two do not agree."""
    val, package = view.gap(ours, theirs), view.gap(ours, theirs, "val_package_loss")
    text = f"{words.interval(val)} nats on val, {words.interval(package)} on val_package"
    text += without_far(view, ours, theirs)
    if val is None or package is None or val.mean * package.mean >= 0:
        return text
    told = val.sign * package.sign == -1
    more = words.untold(val) if val.single else "both told apart from 0" if told else "not both told apart from 0"
    return f"{text} (**the two splits disagree in sign**, {more})"


def without_far(view: View, ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """The difference without the seeds of which a run is far off, beside the one that counts them; and far-off runs
    that are in no pair.
    """
    pair = (ours, theirs)
    gap = view.gap(*pair)
    far = {(records[0]["arm"], seed): loss for records in pair if records for seed, loss in far_off(records).items()}
    named = {key: f"{words.arm_words(key[0])}'s seed {key[1]} at {loss:.3f}" for key, loss in far.items()}
    paired = {seed for _, seed in far if gap and seed in gap.points}
    parts = []
    if paired:
        rest = view.gap(*([r for r in records if r["seed"] not in paired] for records in pair))
        listed = ", ".join(text for (_, seed), text in named.items() if seed in paired)
        parts.append(f"far off: {listed}; without: {words.interval(rest)}")
    if alone := [text for (_, seed), text in named.items() if seed not in paired]:
        parts.append(f"far off and in no pair: {', '.join(alone)}")
    return f" ({'; '.join(parts)})" if parts else ""


def shares(records: Sequence[Record], name: str, digits: int = 1, factor: float = 100) -> str:
    """Mean share of heads in percent (or another mean over heads), and without the runs that are far off where there
    are any: their heads attend to nothing in particular, or to one token alone, and say nothing of the others.
    """
    far = far_off(records)
    text, rest = (words.mean(values(kept, name), digits, factor) for kept in (records, not_far(records)))
    return f"{text} (without seed {', '.join(map(str, far))}: {rest})" if far else text


def not_far(records: Sequence[Record]) -> list[Record]:
    """The runs that are not far off."""
    far = far_off(records)
    return [r for r in records if r["seed"] not in far]


def points(gap: Difference | None) -> Difference | None:
    """A difference of shares, in percentage points."""
    return None if gap is None else difference({seed: 100 * value for seed, value in gap.points.items()})

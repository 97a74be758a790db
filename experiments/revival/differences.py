"""The table of paired differences of docs/relu-revival.md: every pair that a rung is made for, seed by seed."""

from collections.abc import Iterator, Sequence

from revival import words
from revival.cases import CASES, without_far
from revival.records import Record
from revival.verdicts_scale import BOTH, CONTROL, DEPTH, DEVIATIONS, GELU_ONLY
from revival.view import QUARTERS, View, base_of, unlike

OWN, COMMON, SAME = "own best rate", "common rate", "the base's rate"
PAIRS = (("relu", "gelu"), ("ln+relu", "ln+gelu"), ("gelu", "ln+gelu"), ("relu", "ln+relu"))
PREFIXES = tuple(dict.fromkeys(prefix for _, prefix, _ in CASES))
Pair = tuple[str, str, str, Sequence[Record], Sequence[Record]]  # arm, other arm, at which rates, runs, other runs


def differences(view: View, rung: str) -> list[str]:
    """On both held-out splits and on the way."""
    found = {"B": _mechanism, "E": _slopes, "F": _deviations}.get(rung, _four)
    rows = [_row(view, *pair) for pair in found(view, rung) if pair[3] and pair[4]]
    if not rows:
        return []
    columns = ("difference", "at", "lost", words.TEXT, "val (nats)", "seed by seed", "val_package (nats)")
    return words.table([*columns, *(f"at {name} %" for name in QUARTERS)], rows)


def _four(view: View, rung: str) -> Iterator[Pair]:
    """The four arms, at own best and at the common rate."""
    common = view.common_rate(rung)
    for prefix in PREFIXES:
        for one, other in ((prefix + one, prefix + other) for one, other in PAIRS):
            yield one, other, OWN, view.own(rung, one), view.own(rung, other)
            if common is not None and not prefix:
                pair = view.reported(rung, one, common), view.reported(rung, other, common)
                yield (one, other, COMMON, *pair)


def _mechanism(view: View, rung: str) -> Iterator[Pair]:
    """ReLU against GELU at each scale, each arm against its base on rung A, scaled embeddings against norms."""
    for variant in (*BOTH, *GELU_ONLY):
        source, relu = ("A", "relu") if variant in GELU_ONLY else ("B", f"relu{variant}")
        pair = (source, relu), ("B", f"gelu{variant}")
        yield relu, pair[1][1], OWN, view.own(*pair[0]), view.own(*pair[1])
        common = view.common_rate("A")
        if common is not None:
            yield (relu, pair[1][1], COMMON, *(view.reported(*arm, common) for arm in pair))
    variants = [f"{arm}{variant}" for arm in ("gelu", "relu") for variant in (*BOTH, *GELU_ONLY)]
    for arm in (*variants, CONTROL):
        base = next(name for name in ("ln+gelu", "gelu", "relu") if arm.startswith(name))
        yield arm, base, OWN, view.own("B", arm), view.own("A", base)
    for arm in (f"{act}{variant}" for variant in BOTH if variant.startswith("+embed") for act in ("gelu", "relu")):
        normed = f"ln+{base_of(arm)}"
        yield arm, normed, OWN, view.own("B", arm), view.own("A", normed)


def _slopes(view: View, rung: str) -> Iterator[Pair]:
    """Each learned slope against ReLU, whose rate it has, and no decay against decay."""
    for arm in view.arms(rung):
        runs = view.own(rung, arm)
        base = view.reported("A", "relu", runs[0]["lr"]) if runs else []
        yield arm, "relu", SAME, runs, base
    for arm in view.arms(rung):
        if arm.endswith(":nodecay"):
            other = f"{arm.removesuffix('nodecay')}decay"
            yield arm, other, SAME, view.own(rung, arm), view.own(rung, other)


def _deviations(view: View, rung: str) -> Iterator[Pair]:
    """Each deviation against the arm of rung A that it was made of."""
    for variant in DEVIATIONS:
        for base in ("gelu", "relu") if variant != DEPTH else ():  # DEPTH is on rung B
            runs = view.own(rung, base + variant)
            yield base + variant, base, SAME, runs, view.reported("A", base, runs[0]["lr"]) if runs else []


def _row(view: View, one: str, other: str, rates: str, ours: Sequence[Record], theirs: Sequence[Record]) -> list[str]:
    gap = view.gap(ours, theirs)
    seeds = unlike(ours, theirs)
    points = ", ".join(f"{seed}: {words.signed(value)}" for seed, value in gap.points.items()) if gap else words.DASH
    apart = f"; not alike, so not paired: {', '.join(map(str, seeds))}" if seeds else ""
    return [
        f"{words.arm_words(one)} {words.MINUS} {words.arm_words(other)}",
        rates,
        "; ".join(words.lost_words(records) for records in (ours, theirs)),
        words.text_of(ours),
        words.interval(gap) + (" preliminary" if gap and gap.preliminary else "") + without_far(view, ours, theirs),
        points + apart,
        words.interval(view.gap(ours, theirs, "val_package_loss")),
        *(words.interval(view.gap(ours, theirs, quarter)) for quarter in QUARTERS),
    ]

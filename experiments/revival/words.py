"""Numbers and arms as the page says them."""

from collections.abc import Mapping, Sequence

from plotting.seeds import mean_interval
from revival.records import Record
from revival.statistics import Difference, binomial_interval
from revival.tuning import rate_name as rate_name  # every module of the page says words.rate_name
from revival.view import far_off, lost, values

DASH = "-"
TEXT = "tokens; unique; epochs"  # a column
MINUS = "\u2212"
WORDS = {
    "gelu": "GELU",
    "relu": "ReLU",
    "ln+gelu": "LayerNorm + GELU",
    "ln+relu": "LayerNorm + ReLU",
    "identity": "no activation",
}
# Of arms of one rung that share an activation and norms.
RECIPES = ("faithful_prefix", "faithful", "tuned", "warmup", "stopped", "paper_nan")


def arm_words(arm: str) -> str:
    """`ln+gelu+embed50` -> LayerNorm + GELU, embeddings x 50; `faithful:gelu` -> GELU (faithful)."""
    prefix, _, rest = arm.rpartition(":")
    if prefix.startswith(("global", "per_layer")):
        return slope_words(arm)
    name = next((known for known in sorted(WORDS, key=len, reverse=True) if rest.startswith(known)), None)
    if name is None:
        return arm
    extra = rest.removeprefix(name)
    if extra.startswith("+beta"):
        return f"GELU({extra[5:]}x)/{extra[5:]}"
    for short, long in (
        ("+embed22.627", ", embeddings x \u221ad"),
        ("+embed", ", embeddings x "),
        ("-ffbias", ", no feed-forward biases"),
        ("+depth", ", depth-scaled initial values"),
        ("-finalnorm", ", no final norm"),
        ("+dropout", ", embedding dropout .1"),
        ("+fp16", ", fp16"),
    ):
        extra = extra.replace(short, long)
    return WORDS[name] + extra + (f" ({prefix})" if prefix in RECIPES else "")


def change_words(variant: str) -> str:
    """What is changed on rung B: `+embed50` -> embeddings x 50; `+beta10` -> GELU(10x)/10 in GELU's place"""
    name = arm_words(f"gelu{variant}")
    return name.partition(", ")[2] or f"{name} in GELU's place"


def slope_words(arm: str) -> str:
    """`per_layer:0.1:nodecay` -> one slope per layer, start 0.1, no decay"""
    scope, start, decay = arm.split(":")
    how = "one slope for all layers" if scope == "global" else "one slope per layer"
    return f"{how}, start {start}, " + ("no decay" if decay == "nodecay" else "decay of the original's total")


def signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def interval(difference: Difference | None, digits: int = 4) -> str:
    """-0.0123 ± 0.0045 (n = 5)"""
    if difference is None:
        return DASH
    half = "" if difference.half is None else f" ± {difference.half:.{digits}f}"
    return f"{signed(difference.mean, digits)}{half} (n = {difference.n})"


def untold(difference: Difference) -> str:
    """Why a difference has no sign."""
    return "one seed, no interval" if difference.single else "not told apart from 0"


def mean(samples: Mapping[int, float], digits: int = 4, factor: float = 1.0) -> str:
    """Mean and half width of the 95 % t interval."""
    if not samples:
        return DASH
    middle, half = mean_interval([factor * value for value in samples.values()])
    return f"{middle:.{digits}f}".replace("-", MINUS) + (f" ± {half:.{digits}f}" if len(samples) > 1 else "")


def losses(records: Sequence[Record], digits: int = 4) -> str:
    """Mean validation loss and its interval; runs that are far off stand beside it: 3.384 ± 2.375 (seed 5: 6.805)"""
    far = ", ".join(f"seed {seed}: {loss:.{digits}f}" for seed, loss in far_off(records).items())
    return mean(values(records), digits) + (f" ({far})" if far else "")


def lost_words(records: Sequence[Record]) -> str:
    """1 of 5 (1 to 72 %), 1 far off: how many were lost, with the exact 95 % interval, and how many nearly."""
    k, n = lost(records)
    if not n:
        return "not run"
    low, high = binomial_interval(k, n)
    high += 1e-9  # 97.5 % comes out a hair less, and is 98, not 97
    far = len(far_off(records))
    return f"{k} of {n} ({100 * low:.0f} to {100 * high:.0f} %)" + (f", {far} far off" if far else "")


def millions(tokens: float) -> str:
    if tokens >= 1e9:
        return f"{tokens / 1e9:.2f} billion"
    return f"{tokens / 1e6:.1f} million" if tokens >= 1e6 else f"{tokens:,.0f}"


def text_of(records: Sequence[Record]) -> str:
    """Of the first: the cell of the column `TEXT`."""
    if not records:
        return DASH
    first = records[0]
    return f"{millions(first['planned_tokens'])}; {millions(first['unique_tokens'])}; {first['epochs']:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]

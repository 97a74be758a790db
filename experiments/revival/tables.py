"""The tables of docs/relu-revival.md, as lines of Markdown."""

import math
from collections.abc import Sequence

import numpy as np

from revival import words
from revival.heads_table import summary
from revival.records import Record, is_lost
from revival.view import FOUR, View, mean_entropy, overload, values

OWN, COMMON = "own best rate", "common rate"
PAIRS = (("relu", "gelu"), ("ln+relu", "ln+gelu"), ("gelu", "ln+gelu"), ("relu", "ln+relu"))
PREFIXES = ("", "faithful:", "tuned:", "t256:")


def results(view: View, rung: str, lr: float | None = None) -> list[str]:
    """One row an arm: what was lost, and what the others came to. `lr`: at this rate; None: at each arm's own."""
    rows = []
    for arm in view.arms(rung):
        rate = view.own_rate(rung, arm) if lr is None else lr
        records = [] if rate is None else view.reported(rung, arm, rate)
        if records or lr is None:
            rows.append(_row(view, rung, arm, rate, records, lr is None))
    if not rows:
        return ["Not run."]
    columns = (
        "arm",
        "peak rate",
        "lost",
        "val (nats)",
        "val_package (nats)",
        "bits a byte, val",
        "perplexity, this text",
    )
    return words.table([*columns, "heads overloaded (%)", "mean entropy (nats)", "tokens", "unique", "epochs"], rows)


def _row(view: View, rung: str, arm: str, rate: float | None, records: Sequence[Record], own: bool) -> list[str]:
    shown = "not chosen yet" if rate is None else words.rate_name(rate)
    if own and rate is not None and not view.is_settled(rung, arm):
        shown += " (still choosing)"
    nats = values(records)
    perplexity = math.exp(sum(nats.values()) / len(nats)) if nats else None
    first = records[0] if records else None
    return [
        words.arm_words(arm),
        shown,
        words.lost_words(records),
        words.mean(nats),
        words.mean(values(records, "val_package_loss")),
        words.mean(values(records, "val_bits_per_byte")),
        f"{perplexity:.3f}" if perplexity else words.DASH,
        words.mean(overload(records), 1, 100),
        words.mean(mean_entropy(records), 2),
        words.millions(first["planned_tokens"]) if first else words.DASH,
        words.millions(first["unique_tokens"]) if first else words.DASH,
        f"{first['epochs']:.2f}" if first else words.DASH,
    ]


def differences(view: View, rung: str) -> list[str]:
    """Paired differences between arms, at own best and at the common rate, on both held-out splits and on the way."""
    rows = []
    common = view.common_rate(rung)
    for prefix in PREFIXES:
        for one, other in PAIRS:
            for name, lr in ((OWN, None), (COMMON, common)):
                if name == COMMON and (lr is None or prefix):
                    continue
                pair = [
                    view.own(rung, prefix + a) if lr is None else view.reported(rung, prefix + a, lr)
                    for a in (one, other)
                ]
                if all(pair):
                    rows.append(_difference(view, prefix + one, prefix + other, name, pair))
    if not rows:
        return []
    columns = (
        "difference",
        "at",
        "lost",
        "val (nats)",
        "seed by seed",
        "val_package (nats)",
        "at 25 %",
        "at 50 %",
        "at 100 %",
    )
    return words.table(columns, rows)


def _difference(view: View, one: str, other: str, rates: str, pair: Sequence[Sequence[Record]]) -> list[str]:
    ours, theirs = pair
    gap = view.gap(ours, theirs)
    points = ", ".join(f"{words.signed(v)}" for v in gap.points.values()) if gap else words.DASH
    return [
        f"{words.arm_words(one)} {words.MINUS} {words.arm_words(other)}",
        rates,
        "; ".join(words.lost_words(records) for records in (ours, theirs)),
        words.interval(gap) + (" preliminary" if gap and gap.preliminary else ""),
        points,
        words.interval(view.gap(ours, theirs, "val_package_loss")),
        *(words.interval(view.gap(ours, theirs, quarter)) for quarter in ("25", "50", "100")),
    ]


def rates(view: View, rung: str) -> list[str]:
    """Loss against rate: one row an arm, on the tokens that rates are chosen by, never reported elsewhere."""
    tried = {arm: view.tuning(rung, arm) for arm in view.arms(rung)}
    tried = {arm: found for arm, found in tried.items() if found}
    if not tried:
        return []
    ladder = sorted({lr for found in tried.values() for lr in found})
    rows = []
    for arm, found in tried.items():
        best = view.own_rate(rung, arm)
        cells = [_tried(found.get(lr), lr == best) for lr in ladder]
        rows.append([words.arm_words(arm), *cells, "yes" if view.is_settled(rung, arm) else "not yet"])
    return words.table(["arm", *map(words.rate_name, ladder), "optimum interior"], rows)


def _tried(loss: float | None, best: bool) -> str:
    if loss is None:
        return words.DASH
    text = f"{loss:.4f}" if math.isfinite(loss) else "lost"
    return f"**{text}**" if best else text


def lost_runs(view: View, rung: str) -> list[str]:
    """Every lost run by name: why, and at which step."""
    rows = [
        [r["name"], str(r["lost"]["step"] if r["lost"]["step"] is not None else "end"), _first_line(r["lost"]["why"])]
        for r in view.records
        if r["rung"] == rung and is_lost(r)
    ]
    return words.table(["lost run", "step", "why"], rows) if rows else []


def _first_line(text: str) -> str:
    return text.splitlines()[0].replace("|", "/")


def mechanism(view: View, rung: str) -> list[str]:
    """Scale inside the model: pre-activations at the first and last step, and when heads leave the ceiling."""
    rows = []
    for source, arm in [("A", a) for a in FOUR] + [("B", a) for a in view.arms("B") if rung == "B"]:
        records = [r for r in view.own(source, arm) if not is_lost(r)]
        if records and "pre_activation_std" in records[0]:
            rows.append(_scale_row(arm, records))
    columns = ("arm", "runs", "pre-activation std, layer by layer, first step", "last step")
    return words.table([*columns, "heads that never leave .95 of the ceiling (%)", "median step of leaving"], rows)


def _scale_row(arm: str, records: Sequence[Record]) -> list[str]:
    stds = np.mean([np.array(r["pre_activation_std"])[[0, -1]] for r in records], axis=0)
    left = [step for r in records for layer in r["left_ceiling"] for step in layer]
    gone = [step for step in left if step is not None]
    return [
        words.arm_words(arm),
        str(len(records)),
        *(" ".join(f"{value:.3g}" for value in layer) for layer in stds),
        f"{100 * (len(left) - len(gone)) / len(left):.0f}",
        f"{np.median(gone):.0f}" if gone else words.DASH,
    ]


def heads(view: View, rung: str) -> list[str]:
    """Cost of replacing heads' attention, by arm at its own rate: means over seeds."""
    rows = []
    for arm in view.arms(rung):
        records = [r for r in view.own(rung, arm) if not is_lost(r) and r.get("heads")]
        if records:
            rows.append([words.arm_words(arm), str(len(records)), *summary(records)])
    columns = (
        "arm",
        "runs",
        "overloaded heads",
        "one of them, uniform",
        "one of them, its mean",
        "one other head, uniform",
    )
    more = ("one other head, its mean", "all overloaded, uniform", "all overloaded, mean")
    return words.table([*columns, *more], rows) if rows else []

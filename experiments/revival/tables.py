"""The tables of docs/relu-revival.md, as lines of Markdown."""

import math
from collections.abc import Sequence

import numpy as np

from revival import words
from revival.cases import own_rate, shares
from revival.heads_table import replaceable, summary
from revival.records import Record, is_lost, numbers, why_lost
from revival.trace import LEFT
from revival.view import FOUR, View, values


def results(view: View, rung: str, lr: float | None = None) -> list[str]:
    """One row an arm: what was lost, and what the others came to. `lr`: at this rate; None: at each arm's own."""
    rows = []
    for arm in view.arms(rung):
        records = view.own(rung, arm) if lr is None else view.reported(rung, arm, lr)
        if records or lr is None:
            rows.append(_row(view, rung, arm, lr, records))
    if not rows:
        return ["Not run."]
    columns = (
        "arm",
        "peak rate",
        "lost",
        "val (nats)",
        "val_package (nats)",
        "bits per byte, val",
        "bits per byte, val_package",
        "perplexity, this text",
    )
    return words.table([*columns, "heads overloaded (%)", "mean entropy (nats)", "tokens", "unique", "epochs"], rows)


def _row(view: View, rung: str, arm: str, lr: float | None, records: Sequence[Record]) -> list[str]:
    nats = values(records)
    perplexity = math.exp(sum(nats.values()) / len(nats)) if nats else None
    first = records[0] if records else None
    return [
        words.arm_words(arm),
        own_rate(view, rung, arm) if lr is None else words.rate_name(lr),
        words.lost_words(records),
        words.losses(records),
        words.mean(values(records, "val_package_loss")),
        words.mean(values(records, "val_bits_per_byte")),
        words.mean(values(records, "val_package_bits_per_byte")),
        f"{perplexity:.3f}" if perplexity else words.DASH,
        shares(records, "overload"),
        shares(records, "entropy", 2, 1),
        words.millions(first["planned_tokens"]) if first else words.DASH,
        words.millions(first["unique_tokens"]) if first else words.DASH,
        f"{first['epochs']:.2f}" if first else words.DASH,
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
        cells = [_tried(found.get(lr), lr == best and len(found) > 1) for lr in ladder]
        settled = "yes" if view.is_settled(rung, arm) else "no" if len(found) > 1 else "one rate so far"
        rows.append([words.arm_words(arm), *cells, settled])
    return words.table(["arm", *map(words.rate_name, ladder), "optimum interior"], rows)


def _tried(loss: float | None, best: bool) -> str:
    if loss is None:
        return words.DASH
    text = f"{loss:.4f}" if math.isfinite(loss) else "lost"
    return f"**{text}**" if best else text


def lost_runs(view: View, rung: str) -> list[str]:
    """Every lost run by name: why, and at which step."""
    rows = [
        [r["name"], str(r["lost"]["step"] if r["lost"]["step"] is not None else "end"), why_lost(r).replace("|", "/")]
        for r in view.records
        if r["rung"] == rung and is_lost(r)
    ]
    return words.table(["lost run", "step", "why"], rows) if rows else []


def bad_steps(view: View, rung: str) -> list[str]:
    """Runs that were not lost, and had steps whose loss or gradient was not finite."""
    found = [r for r in view.records if r["rung"] == rung and not is_lost(r) and r.get("bad_steps")]
    rows = [[r["name"], f"{r['bad_steps']} of {r['last_step']}"] for r in found]
    return words.table(["run that was not lost", "steps whose loss or gradient was not finite"], rows) if rows else []


def mechanism(view: View, rung: str) -> list[str]:
    """Scale inside the model: pre-activations at the first and last step, and when heads leave the ceiling."""
    rows = []
    for source, arm in [("A", a) for a in FOUR] + [("B", a) for a in view.arms("B") if rung == "B"]:
        everyone = view.own(source, arm)
        if everyone:
            rows.append(_scale_row(arm, everyone))
    if not rows:
        return []
    columns = ("arm", "lost", words.TEXT, "pre-activation std, layer by layer, median run, first step", "last step")
    return words.table(
        [*columns, f"heads that never leave {LEFT:g} of the ceiling (%)", "median step of leaving"], rows
    )


def _scale_row(arm: str, everyone: Sequence[Record]) -> list[str]:
    """Of the runs that were not lost; dashes where there are none."""
    first = [words.arm_words(arm), words.lost_words(everyone), words.text_of(everyone)]
    kept = [r for r in everyone if not is_lost(r)]
    spread = [numbers(r["pre_activation_std"])[[0, -1]] for r in kept if "pre_activation_std" in r]
    stds = np.median(spread, axis=0) if spread else []
    left = [step for r in kept for layer in r.get("left_ceiling", []) for step in layer]
    gone = [step for step in left if step is not None]
    return [
        *first,
        *([" ".join(_short(value) for value in layer) for layer in stds] or [words.DASH] * 2),
        f"{100 * (len(left) - len(gone)) / len(left):.0f}" if left else words.DASH,
        f"{np.median(gone):.0f}" if gone else words.DASH,
    ]


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def heads(view: View, rung: str) -> list[str]:
    """Cost of replacing heads' attention, by arm at its own rate: means over seeds."""
    rows = []
    for arm in view.arms(rung):
        everyone = view.own(rung, arm)
        records = replaceable(everyone)
        if records or (everyone and all(map(is_lost, everyone))):
            row = [words.arm_words(arm), words.lost_words(everyone), words.text_of(everyone)]
            rows.append(row + summary(records))
    columns = ("arm", "lost", words.TEXT, "overloaded heads", "one of them, uniform", "one of them, its mean")
    more = ("one other head, uniform", "one other head, its mean", "standard error of one head, uniform, median")
    more += ("all overloaded, uniform", "all overloaded, mean")
    return words.table([*columns, *more], rows) if rows else []

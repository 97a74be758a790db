"""Verdicts on what is inside the models: heads, learned slopes, and the collapse of the softmax-only model."""

from collections.abc import Sequence

import numpy as np

from revival import words
from revival.cases import CASES, about, preliminary, tokens_of
from revival.heads_table import SMALL, at_once, costs
from revival.records import Record, is_lost, numbers
from revival.statistics import difference
from revival.view import FOUR, View, lost


def wasted(view: View) -> list[str]:
    """Are overloaded heads wasted?"""
    lines = []
    for rung, prefix, _ in CASES:
        for arm in FOUR:
            records = [r for r in view.own(rung, prefix + arm) if not is_lost(r) and r.get("heads")]
            if records:
                lines.append(
                    _wasted(f"{words.arm_words(arm)} ({about(rung, prefix)})", records, view.own(rung, prefix + arm))
                )
    return lines or ["Not run."]


def _wasted(name: str, records: Sequence[Record], everyone: Sequence[Record]) -> str:
    found = costs(records)
    chosen = found.overloaded
    few = "Preliminary: " if len(records) < 5 else ""
    if not chosen.any():
        return f"{few}{name}, {tokens_of(records)}: no head is overloaded; lost: {words.lost_words(everyone)}."
    cheap = int((found.uniform[chosen] < SMALL).sum())
    others = f", any other head {words.signed(float(found.uniform[~chosen].mean()), 5)}" if (~chosen).any() else ""
    return (
        f"{few}{name}, {tokens_of(records)}: with uniform attention in its place, an overloaded head costs "
        f"{words.signed(float(found.uniform[chosen].mean()), 5)} nats on average{others}; {cheap} of "
        f"{int(chosen.sum())} overloaded heads cost less than {SMALL:g} nats each. All of a model's at once: "
        f"{words.mean(at_once(records, 'uniform'))} nats, with their own mean attention "
        f"{words.mean(at_once(records, 'mean'))}; lost: {words.lost_words(everyone)}."
    )


def slopes(view: View) -> list[str]:
    """Do learned slopes go to zero without decay?"""
    lines = []
    for arm in view.arms("E"):
        records = view.own("E", arm)
        kept = [r for r in records if not is_lost(r) and "slopes" in r]
        if not kept:
            lines.append(f"{arm}: no run survived; lost: {words.lost_words(records)}.")
            continue
        ends = np.array([numbers(r["slopes"]["values"])[-1] for r in kept])  # (runs, slopes)
        start = float(numbers(kept[0]["slopes"]["values"])[0].mean())
        points = difference({r["seed"]: float(end.mean()) for r, end in zip(kept, ends, strict=True)})
        scope, _, decay = arm.split(":")
        how = f"{'one slope for all layers' if scope == 'global' else 'a slope a layer'}, start {start:g}, " + (
            "no decay" if decay == "nodecay" else "decay of the original's total"
        )
        zero = "its mean is not told apart from 0" if points.sign == 0 else "its mean is not 0"
        lines.append(
            f"{preliminary(points)}{how}, {tokens_of(kept)}: at the end {words.interval(points, 3)}, from "
            f"{ends.min():.3f} to {ends.max():.3f} over layers and seeds; {zero}; lost: {words.lost_words(records)}."
        )
    return lines or ["Not run."]


def collapse(view: View) -> list[str]:
    """What becomes of the softmax-only model."""
    lines = []
    for arm in view.arms("D"):
        records = view.reported("D", arm)
        steps = [r["lost"]["step"] for r in records if is_lost(r) and r["lost"]["step"] is not None]
        when = f", at steps {min(steps)} to {max(steps)}" if steps else ""
        how = "nothing stops it, fp16" if arm.startswith("paper_nan") else "stopped at the first bad step, bf16"
        nan = sum(bool(r.get("nan_counts", {}).get("attn_probs")) for r in records)
        few = "Preliminary: " if lost(records)[1] < 5 else ""
        lines.append(
            f"{few}Softmax-only GPT-2, {how}, planned {tokens_of(records)}: lost {words.lost_words(records)}{when}; "
            f"NaN in attention probabilities in {nan} of {len(records)} runs."
        )
    return lines or ["Not run."]

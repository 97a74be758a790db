"""What a run warns of while it trains: residuals that leave their range, and heads that overload or collapse.

Everything here happens on the host, on numbers that were written anyway.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from normfree import heads
from normfree.config import Config
from normfree.runs import IN_ORDER, SITES

OF_NUMBERS = ("early_warning", "overloaded", "collapsed", "non_finite")  # kinds that steps done again say again


@dataclass(frozen=True)
class Event:
    """Something worth saying; `layer`: the lowest that it is about.

    `kind`: early_warning, overloaded, collapsed, non_finite, rollback, settings or left_out (a view that failed).
    """

    step: int
    kind: str
    layer: int | None
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layers_in_words(layers: np.ndarray) -> str:
    """[0, 1, 2, 5] -> "layers 0-2, 5"."""
    runs = np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)
    parts = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return ("layer " if len(layers) == 1 else "layers ") + parts


def first_fault(
    step: int,
    arrays: dict[str, np.ndarray],
    sites: tuple[str, ...],
    loss: float = math.nan,
    grad_norm: float = math.nan,
) -> Event:
    """Where the first bad step of a run that goes on went wrong, by what is measured at every step.

    `sites`: those of the array `peak`. `loss`, `grad_norm`: those of the step.
    """
    flags = {site: ~np.isfinite(arrays["peak"][i]) for i, site in enumerate(sites)} if "peak" in arrays else {}
    if "attn_entropy" in arrays:
        flags["attn_probs"] = np.isnan(arrays["attn_entropy"]).any(-1)
    if "resid_max" in arrays:
        flags["block"] = ~np.isfinite(arrays["resid_max"])
    elif "nan_count" in arrays or "inf_count" in arrays:
        counts = [arrays[name][SITES.index("block")] for name in ("nan_count", "inf_count") if name in arrays]
        flags["block"] = np.sum(counts, axis=0) > 0
    for layer in range(max((len(bad) for bad in flags.values()), default=0)):
        for site in IN_ORDER:
            if site in flags and flags[site][layer]:
                where = "the block's output" if site == "block" else site
                return Event(
                    step, "non_finite", layer, f"step {step}: the first NaN or Inf, in {where} of layer {layer}"
                )
    if math.isfinite(loss) and math.isfinite(grad_norm):
        text = f"step {step} is bad, with a finite loss and gradient: a spike, or a weight or moment that is not finite"
    elif math.isfinite(loss):
        text = f"step {step}: the first NaN or Inf, in the backward pass"
    elif "block" in flags:
        text = f"step {step}: the first NaN or Inf, in the head, the loss, the backward pass or a weight"
    else:
        text = f"step {step}: the first NaN or Inf, in the forward pass (where was not measured)"
    return Event(step, "non_finite", None, text)


class ResidualAlarm:
    """Fires when a layer's residual maximum exceeds `factor` times its median over the last `window` steps.

    The median, because growth that doubles at every step drags a maximum along with it. Once a layer; again after it
    has stayed within its range for a whole window. Nothing non-finite enters the window.
    A run that goes on begins a new window.
    """

    def __init__(self, factor: float, window: int, n_layer: int) -> None:
        self.factor = factor
        self.recent: deque[np.ndarray] = deque(maxlen=window)
        self.quiet = np.zeros(n_layer, dtype=np.int64)  # steps until a layer may fire

    def look(self, step: int, resid_max: np.ndarray) -> list[Event]:
        """`resid_max` (n_layer,) of one step."""
        if not np.isfinite(resid_max).all():
            return []
        resid_max = resid_max.astype(np.float64)  # in float32 the median of what nearly overflows would be infinite
        events = []
        if len(self.recent) == self.recent.maxlen:
            median = np.median(self.recent, axis=0)
            high = (median > 0) & (resid_max > self.factor * median)
            new = np.flatnonzero(high & (self.quiet == 0))
            self.quiet = np.where(high, len(self.recent), np.maximum(self.quiet - 1, 0))
            if len(new):
                worst = new[np.argmax(resid_max[new] / median[new])]
                text = (
                    f"step {step}: the residual stream leaves its range in {layers_in_words(new)}: up to "
                    f"{resid_max[worst]:.3g} after layer {worst}, {resid_max[worst] / median[worst]:.1f} times its "
                    f"median over the last {len(self.recent)} steps"
                )
                events.append(Event(step, "early_warning", int(new[0]), text))
        self.recent.append(resid_max)
        return events


class HeadAlarm:
    """Counts overloaded and collapsed heads by layer (`normfree.heads`), and says when a layer first has so many.

    `earlier`: (steps, values) of the arrays max_score, overloaded and collapsed that a run which goes on has already.
    """

    def __init__(self, config: Config, earlier: dict[str, tuple[np.ndarray, np.ndarray]] | None = None) -> None:
        earlier = earlier or {}
        self.T = config.data.seq_len or 1
        self.after = max(1, config.optim.warmup_steps or 0)  # at the start every head is as even as can be
        self.n_head = config.model.n_head
        self.max_score = earlier["max_score"][1][-1] if "max_score" in earlier else None
        self.overloaded: np.ndarray = np.zeros(config.model.n_layer, dtype=bool)  # layers that it was said of
        self.collapsed = np.zeros(config.model.n_layer, dtype=np.int64)  # most heads that it was said of
        if "overloaded" in earlier:
            steps, counts = earlier["overloaded"]
            self.overloaded |= np.asarray((counts[steps >= self.after] > self.n_head / 2).any(axis=0))
        if "collapsed" in earlier:
            self.collapsed = earlier["collapsed"][1].max(axis=0)

    def look(self, step: int, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[Event]]:
        """Of one record's arrays, (n_layer, n_head) each: the counts (n_layer,), and what they give to say."""
        counts: dict[str, np.ndarray] = {}
        if "attn_entropy" in arrays:
            counts["overloaded"] = heads.is_overloaded(arrays["attn_entropy"], self.T).sum(-1, dtype=np.int64)
        if {"attn_entropy", "max_score", "one_minus_max"} <= arrays.keys():
            before = np.full_like(arrays["max_score"], np.nan) if self.max_score is None else self.max_score
            collapsed = heads.is_collapsed(
                arrays["attn_entropy"],
                self.T,
                one_minus_max=arrays["one_minus_max"],
                max_score=arrays["max_score"],
                earlier_max_score=before,
            )
            self.max_score = arrays["max_score"]
            counts["collapsed"] = collapsed.sum(-1, dtype=np.int64)
        return counts, self._events(step, counts)

    def _events(self, step: int, counts: dict[str, np.ndarray]) -> list[Event]:
        events = []
        if "overloaded" in counts and step >= self.after:
            most = counts["overloaded"] > self.n_head / 2
            new = np.flatnonzero(most & ~self.overloaded)
            self.overloaded |= most
            if len(new):
                text = (
                    f"step {step}: most heads of {layers_in_words(new)} are overloaded (entropy >= 3/4 of its ceiling)"
                )
                events.append(Event(step, "overloaded", int(new[0]), text))
        if "collapsed" in counts:
            new = np.flatnonzero(counts["collapsed"] > self.collapsed)
            self.collapsed = np.maximum(self.collapsed, counts["collapsed"])
            if len(new):
                n = int(counts["collapsed"][new].sum())
                text = (
                    f"step {step}: {n} head{'s' * (n > 1)} of {layers_in_words(new)} collapsed (low entropy, nearly "
                    "one-hot, and the largest score rising)"
                )
                events.append(Event(step, "collapsed", int(new[0]), text))
        return events

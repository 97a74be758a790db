"""What a run directory says of a cell on its way: entropy, overload and scale over steps, and whether it was lost."""

from pathlib import Path
from typing import Any

import numpy as np

from normfree.heads import OVERLOADED, entropy_ceiling
from normfree.runs import Run
from plotting.layerwise_entropy import mean_over_heads

POINTS = 20  # steps that are kept of a trajectory
LEFT = 0.95  # of the ceiling: below it, a head has left it
SITES = ("block", "attn", "mlp", "attn_probs")  # whose NaN and Inf are kept


def trajectories(run: Run) -> dict[str, Any]:
    """Of the probe, at about `POINTS` steps: mean entropy of each layer, share of overloaded heads, pre-activations.

    `left_ceiling`: the first recorded step at which each head is below `LEFT` of its ceiling, null where none is.
    """
    if not run.has("probe_attn_entropy"):
        return {}
    steps, entropy = run.array("probe_attn_entropy")  # (records, n_layer, n_head)
    level = entropy / entropy_ceiling(run.config.data.seq_len or 0)
    kept = thinned(len(steps))
    found: dict[str, Any] = {
        "steps_kept": steps[kept],
        "layer_entropy": np.round(mean_over_heads(entropy[kept]), 4),
        "overloaded_share": np.round((level[kept] >= OVERLOADED).mean(axis=(1, 2)), 4),
        "left_ceiling": first_below(steps, level),
    }
    for name, key in (("probe_mlp_pre_std", "pre_activation_std"), ("probe_resid_rms", "residual_rms")):
        if run.has(name):
            found[key] = rounded(run.array(name)[1][kept])
    if run.has("probe_max_score"):
        found["max_score"] = rounded(run.array("probe_max_score")[1][kept].max(axis=-1))
    if run.has("act_slope"):
        at, slopes = run.array("act_slope")
        chosen = thinned(len(at))
        found["slopes"] = {"steps": at[chosen], "values": np.round(slopes[chosen].astype(np.float64), 5)}
    return found | bad_numbers(run)


def rounded(values: np.ndarray) -> list[Any]:
    """Four significant digits."""
    return np.vectorize(lambda x: float(f"{x:.4g}"))(values.astype(np.float64)).tolist()


def thinned(n: int) -> np.ndarray:
    """Indices of at most `POINTS` of n records, evenly, first and last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))


def first_below(steps: np.ndarray, level: np.ndarray) -> list[list[int | None]]:
    """(n_layer, n_head) first steps at which `level` (records, n_layer, n_head) is below `LEFT`; a NaN is not below."""
    below = level < LEFT
    first: np.ndarray = steps[below.argmax(axis=0)].astype(object)
    first[~below.any(axis=0)] = None
    return first.tolist()


def bad_numbers(run: Run) -> dict[str, Any]:
    """NaN and Inf elements of the training batch by site and layer, where there were any; else nothing."""
    found: dict[str, Any] = {}
    for name, counts in (("nan", run.counts), ("inf", run.inf_counts)) if run.has("nan_count") else ():
        steps = run.array(f"{name}_count")[0]
        kept = thinned(len(steps))
        shown = {site: counts[site][kept] for site in SITES if site in counts and counts[site].any()}
        if shown:
            found[f"{name}_counts"] = {"steps": steps[kept], **shown}
    return found


def bad_steps(run: Run) -> int:
    """Training steps whose loss or gradient was not finite: left out, gone on from or, the one of a stop, looked at."""
    values = run.series("bad_steps")[1]
    if len(values):
        return int(values[-1])
    return int(run.config.nan_policy == "raise" and run.status["status"] == "diverged")  # it counts none: it stops


def account(run: Run, probes: int) -> dict[str, Any] | None:
    """Why and at which step a run is lost, with the flight recorder's account where there is one; None: it is not."""
    status = run.status
    if status["status"] == "diverged":
        return {
            "step": status["last_step"],
            "why": without_paths(str(status["reason"]), run.directory),
            "account": postmortem(run),
        }
    if not run.has("probe_nan_count"):
        return None
    steps, nan = run.array("probe_nan_count")
    bad = (nan + run.array("probe_inf_count")[1]).reshape(len(steps), -1).any(axis=1)
    in_a_row = 0
    for step, is_bad in zip(steps.tolist(), bad.tolist(), strict=True):
        in_a_row = in_a_row + 1 if is_bad else 0
        if in_a_row == probes:
            return {"step": step, "why": f"the probe's forward pass was not finite {probes} times in a row"}
    return None


def postmortem(run: Run) -> str | None:
    """The flight recorder's README."""
    texts = sorted((run.directory / "postmortem").glob("step-*/README.txt"))
    return without_paths(texts[-1].read_text(encoding="utf-8"), run.directory) if texts else None


def without_paths(text: str, directory: Path) -> str:
    """No machine's paths in what is committed."""
    return text.replace(str(directory.resolve()), "RUN").replace(str(directory), "RUN")

"""Run directories with every array the report knows, written in bulk: thousands of records in a second."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from normfree.config import Config, resolve
from normfree.heads import entropy_ceiling
from normfree.records import ArrayInfo, RunWriter
from normfree.runs import Run, load_run

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><b>&amp;"
ALL_SITES = ("block", "attn", "mlp", "attn_probs", "q", "k", "v", "mlp_hidden")


def fault_of(step: int, layer: int) -> dict[str, Any]:
    return {
        "step": step,
        "phase": "forward",
        "module": f"blocks.{layer}.mlp.fc",
        "tensor": "output",
        "value": "NaN",
        "reproduced": True,
        "postmortem": f"postmortem/step-{step:08d}",
        "text": f"At step {step} blocks.{layer}.mlp.fc turned inputs up to 3.1e+04 into 12 NaN of 262,144 outputs.",
    }


EVENTS = [
    {"step": 60, "kind": "overloaded", "layer": 0, "text": "9 of 12 heads of layer 0 are overloaded"},
    {"step": 190, "kind": "early_warning", "layer": 3, "text": "resid_max grew tenfold in 40 steps"},
    {"step": 213, "kind": "non_finite", "layer": None, "text": "the gradient norm is Inf"},
]


def write_array(directory: Path, name: str, steps: np.ndarray, values: np.ndarray, axes: tuple[str, ...]) -> None:
    """A whole array at once, in the format of `RunWriter.array`."""
    info = ArrayInfo(
        tuple(values.shape[1:]), values.dtype.str.lstrip("<>=|"), axes, "nats" if "entropy" in name else ""
    )
    records = np.zeros(len(steps), info.record)
    records["step"], records["value"] = steps, values
    folder = directory / "arrays"
    (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(info)) + "\n")
    records.tofile(folder / f"{name}.bin")


def settled(rng: np.random.Generator, n: int, n_layer: int, n_head: int, T: int) -> np.ndarray:
    """Entropies that leave the ceiling and settle, with noise in every bit: float32 (n, n_layer, n_head)."""
    depth = np.linspace(0, 1, n_layer)[:, None]
    base = 0.95 - 0.6 * depth + rng.normal(0, 0.12, (n_layer, n_head))
    time = np.exp(-np.linspace(0, 5, n))[:, None, None]
    level = np.clip(1 - (1 - base) * (1 - time) + rng.normal(0, 0.01, (n, n_layer, n_head)), 0.01, 1)
    return (level * entropy_ceiling(T)).astype(np.float32)


def make_full_run(
    directory: Path,
    *,
    n: int = 30,
    every: int = 10,
    n_layer: int = 6,
    n_head: int = 8,
    T: int = 128,
    name: str = "full",
    seed: int = 1,
    fault_at: int | None = None,
    points: int | None = None,
    **settings: Any,
) -> Run:
    """A run of `n` records with all arrays; `fault_at`: the record from which the upper layers are NaN."""
    config = Config(name=name, seed=seed)
    config.model.n_layer, config.model.n_head, config.model.n_embd = n_layer, n_head, 8 * n_head
    config.data.seq_len, config.model.norm, config.model.act = T, "none", "relu"
    for key, value in settings.items():
        setattr(config.optim, key, value)
    writer = RunWriter(directory)
    writer.config(resolve(config))
    steps, rng = every * np.arange(n), np.random.default_rng(seed)
    _statistics(directory, steps, rng, n_layer, n_head, T, fault_at)
    _snapshots(directory, steps[:: max(1, n // 3)], rng, n_layer, n_head, T)
    _curves(writer, points or n, every * n // (points or n) or 1, rng, fault_at and int(steps[fault_at]))
    lost: dict[str, Any] = {}
    if fault_at is not None:
        lost = {"status": "diverged", "fault": fault_of(int(steps[fault_at]), n_layer // 2)}
    writer.status(**{"status": "finished", "last_step": int(steps[-1]), "events": EVENTS, "warnings": []} | lost)
    writer.close()
    return load_run(directory)


def _statistics(
    directory: Path, steps: np.ndarray, rng: np.random.Generator, n_layer: int, n_head: int, T: int, bad: int | None
) -> None:
    n = len(steps)
    counts = np.zeros((n, len(ALL_SITES), n_layer), np.int64)
    for source in ("", "probe_"):
        entropy = settled(rng, n, n_layer, n_head, T)
        if bad is not None:
            first = n_layer // 2
            entropy[bad:, first:] = np.nan
            counts[bad:, :, first:] = 1000 * (1 + np.arange(n_layer - first))
            counts[bad, :, first], counts[bad, 7, first] = 0, 12
        write_array(directory, f"{source}attn_entropy", steps, entropy, ("layer", "head"))
    write_array(directory, "nan_count", steps, counts, ("site", "layer"))
    write_array(directory, "inf_count", steps, counts // 3, ("site", "layer"))
    write_array(directory, "elements", steps, np.full((n, len(ALL_SITES)), 262144), ("site",))
    growth = np.exp(np.linspace(0, 3, n))[:, None] * np.arange(1, n_layer + 1)
    for name, factor in (("resid_rms", 1.0), ("resid_max", 40.0), ("grad_norm", 0.1), ("update_norm", 0.01)):
        noisy = factor * growth * rng.lognormal(0, 0.1, (n, n_layer))
        write_array(directory, name, steps, noisy.astype(np.float32), ("layer",))
    for name in ("max_score", "sink_mass", "one_minus_max"):
        write_array(directory, name, steps, rng.random((n, n_layer, n_head), np.float32), ("layer", "head"))
    for name in ("overloaded", "collapsed"):
        write_array(directory, name, steps, rng.integers(0, n_head + 1, (n, n_layer)), ("layer",))


def _snapshots(directory: Path, steps: np.ndarray, rng: np.random.Generator, n_layer: int, n_head: int, T: int) -> None:
    shape = (len(steps), n_layer, n_head)
    share = rng.uniform(0.3, 1, (*shape, 1))
    rows = (share * np.log1p(np.arange(T))).astype(np.float32)
    write_array(directory, "probe_position_entropy", steps, rows, ("layer", "head", "position"))
    write_array(directory, "probe_effective_width", steps, np.exp(rows).mean(-1), ("layer", "head"))
    quantiles = np.sort(rng.random((*shape, 7), np.float32), axis=-1)
    write_array(directory, "probe_entropy_quantiles", steps, quantiles, ("layer", "head", "quantile"))


def _curves(writer: RunWriter, n: int, every: int, rng: np.random.Generator, lost_at: int | None) -> None:
    for i in range(n):
        loss = 3 + 5 * float(np.exp(-6 * i / n)) + float(np.float32(rng.normal(0, 0.05)))
        if lost_at is not None and i * every >= lost_at:
            loss = float("nan")
        row = {"train/loss": loss, "lr": 1e-3 * i / n, "grad_norm": abs(loss) / 4, "tokens_per_second": 1e4 + i}
        writer.scalars(i * every, row)
        if i % 10 == 9:
            writer.scalars(i * every, {"val/loss": loss + 0.05, "val/perplexity": float(np.exp(loss + 0.05))})

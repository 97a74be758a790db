"""Small run directories with known numbers, as the trainer would write them."""

import math
from pathlib import Path

import numpy as np

from normfree.config import Config, resolve
from normfree.heads import entropy_ceiling
from normfree.runs import SITES, Run, RunWriter, load_run

STEPS = tuple(range(0, 501, 50))


def make_run(
    directory: Path,
    n_layer: int = 6,
    n_head: int = 8,
    *,
    name: str | None = None,
    seed: int = 1,
    norm: str = "none",
    act: str = "relu",
    lr: float = 1e-3,
    seq_len: int = 128,
    status: str = "finished",
    nan_from: int | None = None,
    lost_from: int | None = None,
    probe: bool = True,
    entropy: np.ndarray | None = None,
    steps: tuple[int, ...] = STEPS,
) -> Run:
    """A run of 500 steps. `nan_from`: NaN appears in the upper layers; `lost_from`: the loss is NaN from this step."""
    config = Config(name=name or f"gpt2-nano-{norm}-{act}", seed=seed)
    config.model.n_layer, config.model.n_head, config.model.n_embd = n_layer, n_head, 8 * n_head
    config.model.block_size, config.data.seq_len = max(seq_len, 256), seq_len
    config.model.norm, config.model.act, config.optim.lr = norm, act, lr
    writer = RunWriter(directory)
    writer.config(resolve(config))
    rng = np.random.default_rng(seed)
    depth = np.linspace(0, 1, n_layer)[:, None] if n_layer > 1 else np.zeros((1, 1))
    base = 0.9 - 0.6 * depth + rng.normal(0, 0.12, (n_layer, n_head))
    for step in steps:
        level = np.clip(1 - (1 - base) * (1 - math.exp(-step / 120)), 0.02, 0.999)
        values = (level * entropy_ceiling(seq_len)).astype(np.float32) if entropy is None else entropy
        _write_record(writer, step, values.astype(np.float32), nan_from, probe)
        _write_scalars(writer, step, rng, lr, norm, lost_from)
    reason = {"reason": "loss is NaN"} if status == "diverged" else {}
    writer.status(status=status, last_step=steps[-1] if steps else 0, **reason)
    writer.close()
    return load_run(directory)


def _write_record(writer: RunWriter, step: int, entropy: np.ndarray, nan_from: int | None, probe: bool) -> None:
    n_layer, n_head = entropy.shape
    entropy, counts = entropy.copy(), np.zeros((len(SITES), n_layer), np.int64)
    if nan_from is not None and step >= nan_from:
        first = n_layer // 2
        entropy[first, ::2] = np.nan
        entropy[first + 1 :] = np.nan
        counts[:, first:] = (1 + np.arange(n_layer - first)) * (step - nan_from + 50) * 16
    axes = ("layer", "head")
    writer.array("attn_entropy", step, entropy, axes, "nats")
    if probe:
        writer.array("probe_attn_entropy", step, (0.98 * entropy).astype(np.float32), axes, "nats")
    writer.array("nan_count", step, counts, ("site", "layer"), "elements")
    writer.array("inf_count", step, counts // 4, ("site", "layer"), "elements")
    writer.array("elements", step, np.full(len(SITES), 10**6), ("site",), "elements")
    slopes = (0.01 * math.exp(-step / 200) * np.linspace(1, -0.4, n_layer)).astype(np.float32)
    writer.array("act_slope", step, slopes, ("layer",), "slope")


def _write_scalars(
    writer: RunWriter, step: int, rng: np.random.Generator, lr: float, norm: str, lost_from: int | None
) -> None:
    floor = 3.0 + (0.25 if norm == "none" else 0.0) + 100 * abs(lr - 1e-3)
    loss = floor + 5.5 * math.exp(-step / 90) + float(rng.normal(0, 0.03))
    if lost_from is not None and step >= lost_from:
        loss = math.nan
    writer.scalars(step, {"train/loss": loss, "lr": lr, "grad_norm": 1.0, "tokens_per_second": 1e4, "seconds": 0.1})
    if step % 100 == 0:
        value = loss + 0.05
        writer.scalars(step, {"val/loss": value, "val/perplexity": math.exp(value), "val/bits_per_byte": value / 2.5})

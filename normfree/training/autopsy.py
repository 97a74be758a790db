"""What is found out about a bad step, and kept: while the weights are still as they were before it."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normfree.config import Config
from normfree.diagnostics.finding import Finding
from normfree.diagnostics.hooks import LEVELS
from normfree.diagnostics.trace import first_non_finite
from normfree.runs import SITES
from normfree.training import faults, machine
from normfree.training.alarms import Event
from normfree.training.postmortem import Circumstances, write_postmortem
from normfree.training.record import SCALARS, Record
from normfree.training.schedules import learning_rate
from normfree.training.step import StepInputs

if TYPE_CHECKING:
    from normfree.training.loop import Trainer


SPIKE = "every number is finite, but the loss jumps too far above those before it (spike_sigma)."


def autopsy(trainer: "Trainer", step: int, values: Tensor, record: Record, recorded: bool) -> faults.Diverged:
    """Run the bad step again, eagerly, and name the first module with a NaN or Inf.

    `values`: the step's packed vector. Unless the step was `recorded`, the statistics of its forward pass are.
    """
    config = trainer.config
    loss, norm = (values[SCALARS.index(name)].item() for name in ("loss", "grad_norm"))
    finding: Finding | None = None
    try:
        flat = forward_once_more(trainer, step)
        if not recorded:
            record.write_arrays(step, trainer.recorder.unpack(flat), "", config.train.batch_size)
        finding = trace(trainer, step)
        where = place_in_words(trainer, flat, finding, loss, norm)
    except Exception as error:  # too little memory, say: that the run diverged is what has to be said
        trainer.injector.undo()
        trainer.recorder.level = "off"
        where = f"running the step once more, to say where, failed ({type(error).__name__}: {error})."
    return faults.Diverged(
        step,
        f"step {step}: the training loss is {loss:g} and the gradient norm {norm:g}; {where} "
        f"The weights are as they were before that step.{given_up(config)}",
        faults.Fault(finding, loss, norm),
    )


def place_in_words(trainer: "Trainer", flat: Tensor, finding: Finding | None, loss: float, norm: float) -> str:
    if finding is not None:
        return f"first of all, {finding.words()}"
    if math.isfinite(loss) and math.isinf(norm):
        return "every gradient is finite, but the norm of all together overflows float32."
    if is_spike(trainer.config, loss, norm):
        return SPIKE
    return block_in_words(trainer, flat)


def is_spike(config: Config, loss: float, norm: float) -> bool:
    """Of a bad step whose weights and moments are finite."""
    return config.spike_sigma is not None and math.isfinite(loss) and math.isfinite(norm)


def given_up(config: Config) -> str:
    """Why nan_policy=skip stops after all."""
    return f" It is the last of {faults.MAX_SKIPS} bad steps in a row, all skipped." * (config.nan_policy == "skip")


def skipped(trainer: "Trainer", step: int, values: Tensor) -> Event:
    """Of the first step that nan_policy=skip leaves out: where it went wrong. On CUDA two later updates may be in."""
    loss, norm = (values[SCALARS.index(name)].item() for name in ("loss", "grad_norm"))
    layer = None
    try:
        finding = trace(trainer, step)
    except Exception as error:  # the run goes on, whatever happens here
        trainer.injector.undo()
        where = f"running it once more, to say where, failed ({type(error).__name__}: {error})."
    else:
        if finding is not None:
            where = finding.words()
            layer = re.match(r"blocks\.(\d+)", finding.module)
        else:
            where = SPIKE if is_spike(trainer.config, loss, norm) else "it was not met again when run once more."
    text = f"step {step} is skipped: the training loss is {loss:g} and the gradient norm {norm:g}; {where}"
    return Event(step, "non_finite", int(layer[1]) if layer else None, text)


@torch.no_grad()
def forward_once_more(trainer: "Trainer", step: int) -> Tensor:
    """Every statistic of the step's forward passes, flat, on the host."""
    trainer.recorder.start(trainer.micro_batches)
    with machine.autocast(trainer.device, trainer.precision):
        for i, (idx, _) in enumerate(trainer.micro_batch(trainer.batches.rows(step))):
            trainer.seed_dropout(step, i)
            trainer.injector.before_forward(step, i)
            trainer.model.hidden(idx)
    trainer.injector.undo()
    return trainer.recorder.stop().cpu()


def trace(trainer: "Trainer", step: int) -> Finding | None:
    """The first non-finite value of the step, met again eagerly with the weights as they are."""
    inputs = StepInputs(trainer.config, step, trainer.batches.rows(step), trainer.device, trainer.precision)
    return first_non_finite(
        trainer.model,
        inputs.losses(trainer.model),
        step=step,
        scale=trainer.scaler.scale,
        optimizer=trainer.optimizer,
        injector=trainer.injector,
    )


def block_in_words(trainer: "Trainer", flat: Tensor) -> str:
    """Where the fault is not met again: the first block that the counts blame."""
    arrays = trainer.recorder.unpack(flat)
    counts = [arrays[name] for name in ("nan_count", "inf_count") if name in arrays]
    if not counts:
        return "it was not met again, and diagnostics.statistics has no nan_count to say in which layer it was."
    bad = np.sum(counts, axis=0)[SITES.index("block")] > 0
    if not bad.any():
        return "it was not met again when the step was run once more."
    return f"the first block with NaN or Inf in its output is block {int(bad.argmax())}."


def ring_arrays(trainer: "Trainer", until: int) -> dict[str, np.ndarray]:
    """The flight recorder up to step `until` by name, (steps, ...); what a reader wants first comes first.

    Of a statistic with several sites, those that are measured at every step. NaN where `level`, a place in
    `hooks.LEVELS`, did not measure it.
    """
    entries, rows = trainer.ring.read(until)
    scalars = {name: rows[:, i] for i, name in enumerate(SCALARS)}
    arrays = {"step": np.array([e.step for e in entries]), "lr": np.array([e.lr for e in entries])}
    arrays |= {name: scalars.pop(name) for name in ("loss", "grad_norm")}
    names = trainer.recorder.watch_names if trainer.watch != "off" else []
    watched = [_watched(trainer, e.level, row[len(SCALARS) :]) for e, row in zip(entries, rows, strict=True) if names]
    # A statistic that failed is left out.
    arrays |= {name: np.stack([w[name] for w in watched]) for name in names if watched and name in watched[0]}
    levels = np.array([LEVELS.index(e.level) for e in entries])
    return arrays | scalars | {"batch": np.array([e.batch for e in entries]), "level": levels}


def _watched(trainer: "Trainer", level: str, row: np.ndarray) -> dict[str, np.ndarray]:
    recorder = trainer.recorder
    arrays = recorder.unpack(torch.from_numpy(row), recorder.watch_names)
    for name, value in arrays.items():
        statistic = recorder.statistics[name]
        if len(statistic.sites) > 1:
            value = value[[statistic.sites.index(site) for site in statistic.every_step]]
        if level == "residual" and "block" not in statistic.every_step:
            value = np.full_like(value, np.nan)
        arrays[name] = value
    return arrays


def keep_postmortem(
    trainer: "Trainer", error: faults.Diverged, checkpoint: Path, plugins: list[dict[str, str]]
) -> Path:
    """Keep what running the bad step again needs; `checkpoint`: the state before it. Raises OSError."""
    assert error.fault is not None, "the step was not traced"
    finding, loss, norm = error.fault
    lr = learning_rate(error.step, trainer.config.train.max_steps, trainer.config.optim)
    lr *= trainer.rollbacks.lr_factor(error.step)
    return write_postmortem(
        trainer.run_dir,
        error.step,
        trainer.config,
        checkpoint=checkpoint,
        rows=trainer.batches.rows(error.step),
        indices=trainer.batches.indices(error.step),
        finding=finding,
        circumstances=Circumstances(loss, norm, lr, trainer.device.type, trainer.compiled, str(error), plugins),
        ring=ring_arrays(trainer, error.step),
    )

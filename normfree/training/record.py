"""The numbers of a step: packed on the device into one vector, unpacked on the host into the run's record."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from normfree.config import Config
from normfree.diagnostics import Recorder
from normfree.records import RunWriter
from normfree.runs import SITES
from normfree.training.views import Views

SCALARS = ("first_bad", "bad_steps", "loss", "grad_norm", "loss_scale", "scaler_skips")


@dataclass(frozen=True)
class Packed:
    """What the vector of a step holds behind the six scalars."""

    lr: float | None = None  # None: no training step, only the probe
    train: bool = False
    probe: bool = False


class Record:
    """Writes settled steps to the run directory and its views."""

    def __init__(
        self, config: Config, recorder: Recorder, writer: RunWriter, views: Views, probe_sequences: int, n_slopes: int
    ) -> None:
        self.config = config
        self.probe_sequences = probe_sequences
        self.recorder = recorder
        self.writer = writer
        self.views = views
        self.n_slopes = n_slopes
        self.last_loss = float("nan")
        self.started = time.monotonic()
        self.train_seconds = 0.0
        self.tokens = 0
        self._mark: tuple[float, int] | None = None

    # -- time -----------------------------------------------------------------------------------------------------

    def clock(self, tokens: int, seconds: float) -> None:
        """Take in the time of training steps only; evaluation, probes and compilation stay out of the rate."""
        self.tokens += tokens
        self.train_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else float("nan")

    def _recent_rate(self) -> float | None:
        """Tokens per second since the last line; None where no time has been taken yet."""
        seconds, tokens = self._mark or (0.0, 0)
        self._mark = (self.train_seconds, self.tokens)
        return (self.tokens - tokens) / (self.train_seconds - seconds) if self.train_seconds > seconds else None

    # -- numbers --------------------------------------------------------------------------------------------------

    def take(self, step: int, values: Tensor, packed: Packed) -> None:
        """Write what the packed vector of `step` holds."""
        head = dict(zip(SCALARS, values[: len(SCALARS)].tolist(), strict=True))
        rest = values[len(SCALARS) :]
        if packed.lr is not None:
            self.last_loss = head["loss"]
            if step % self.config.log.every == 0 or packed.train or head["first_bad"] == step:
                self._write_scalars(step, head, packed.lr)
        if packed.probe:
            self.write_arrays(step, rest[: self.recorder.size()], "probe_", self.probe_sequences)
            rest = rest[self.recorder.size() :]
        if packed.train:
            self.write_arrays(step, rest[: self.recorder.size()], "", self.config.train.batch_size)
            rest = rest[self.recorder.size() :]
            n_layer = self.config.model.n_layer
            self._array("grad_norm", step, rest[:n_layer].numpy().astype(np.float32), ("layer",), "")
            if self.n_slopes:
                axes = ("layer",) if self.n_slopes == n_layer else ("shared",)
                self._array("act_slope", step, rest[n_layer:].numpy().astype(np.float32), axes, "")

    def _write_scalars(self, step: int, head: dict[str, float], lr: float) -> None:
        row = {"train/loss": head["loss"], "lr": lr, "grad_norm": head["grad_norm"]}
        if self.config.nan_policy != "raise":
            row["bad_steps"] = int(head["bad_steps"])
        if self.config.train.precision == "fp16":
            row |= {"loss_scale": head["loss_scale"], "scaler_skips": int(head["scaler_skips"])}
        rate = self._recent_rate()
        self.scalars(step, row if rate is None else row | {"tokens_per_second": rate})

    def write_arrays(self, step: int, flat: Tensor, prefix: str, sequences: int) -> None:
        for name, value in self.recorder.unpack(flat).items():
            self._array(prefix + name, step, value, self.recorder.axes(name), self.recorder.statistics[name].unit)
        self._array(f"{prefix}elements", step, self.elements(sequences), ("site",), "elements")

    def elements(self, sequences: int) -> np.ndarray:
        """How many numbers `nan_count` looks at, by site: int64 (sites,)."""
        T, C, H = self.config.data.seq_len or 0, self.config.model.n_embd, self.config.model.n_head
        return np.array([sequences * (H * T * T if site == "attn_probs" else T * C) for site in SITES], dtype=np.int64)

    def _array(self, name: str, step: int, value: np.ndarray, axes: tuple[str, ...], unit: str) -> None:
        self.writer.array(name, step, value, axes, unit)
        self.views.array(name, step, value, axes)

    def scalars(self, step: int, row: dict[str, float]) -> None:
        row = row | {"seconds": round(time.monotonic() - self.started, 3)}
        self.writer.scalars(step, row)
        self.views.scalars(step, row)


def pack(*parts: Tensor | None) -> Tensor:
    """One flat float64 vector on the device."""
    return torch.cat([p.detach().flatten().double() for p in parts if p is not None])

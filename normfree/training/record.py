"""The numbers of a step: packed on the device into one vector, unpacked on the host into the run's record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normfree.config import Config
from normfree.diagnostics.hooks import Recorder
from normfree.diagnostics.parameters import ParameterRecorder
from normfree.records import RunWriter, read_records
from normfree.runs import SITES
from normfree.training.alarms import OF_NUMBERS, Event, HeadAlarm, ResidualAlarm, first_fault
from normfree.training.views import Views

SCALARS = ("first_bad", "bad_steps", "loss", "grad_norm", "bad_loss_rows", "loss_scale", "scaler_skips", "bad_in_a_row")


class Due(NamedTuple):
    """What a training step records beyond what every step does."""

    record: bool = False
    snapshot: bool = False
    probe: Tensor | None = None  # the packed statistics of the probe, on the device


@dataclass(frozen=True)
class Packed:
    """What the vector of a step holds behind `SCALARS`: the watch, the probe, the record of the training step."""

    lr: float | None = None  # None: no training step, only the probe
    record: bool = False
    probe: bool = False
    snapshot: bool = False
    watch: str = "off"


class Record:
    """Writes settled steps to the run directory and its views, and says what they warn of."""

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        parameter_recorder: ParameterRecorder,
        writer: RunWriter,
        views: Views,
        probe_sequences: int,
        n_slopes: int,
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.recorder = recorder
        self.parameter_recorder = parameter_recorder
        self.writer = writer
        self.views = views
        self.probe_sequences = probe_sequences
        self.n_slopes = n_slopes
        self.say = say
        self.set_alarms()
        self.last_loss = float("nan")
        self.last_step: int | None = None  # the one it is of; None: no training step has settled
        self.failed: set[str] = set()  # statistics that it was said of
        self.missed: list[int] = []  # steps whose checkpoint could not be written
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

    def rewind(self, step: int) -> None:
        """Drop what was recorded of `step` and after, and what it gave to say: those steps are done again."""
        self.writer.rewind(step)
        events = self.writer.fields.get("events", [])
        unsaved = [missed for missed in self.writer.fields.get("unsaved_checkpoints", []) if missed < step]
        kept = [e for e in events if e["step"] < step or e["kind"] not in OF_NUMBERS]
        self.writer.status(events=kept, unsaved_checkpoints=unsaved)
        self.missed = [missed for missed in self.missed if missed < step]
        self.last_step = None
        self.set_alarms()

    def set_alarms(self) -> None:
        """What they know of the steps before comes from the record."""
        diagnostics = self.config.diagnostics
        self.residual = ResidualAlarm(diagnostics.warn_factor, diagnostics.warn_window, self.config.model.n_layer)
        earlier = {}
        for name in ("max_score", "overloaded", "collapsed"):
            path = self.writer.directory / "arrays" / f"{name}.bin"
            if path.exists():
                records = read_records(path)
                earlier[name] = (records["step"], records["value"])
        self.heads = HeadAlarm(self.config, earlier)

    # -- numbers --------------------------------------------------------------------------------------------------

    def take(self, step: int, values: Tensor, packed: Packed) -> None:
        """Write what the packed vector of `step` holds."""
        parts = _Reader(values)
        head = dict(zip(SCALARS, parts.next(len(SCALARS)).tolist(), strict=True))
        if packed.lr is not None:
            self.last_loss, self.last_step = head["loss"], step
            if step % self.config.log.every == 0 or packed.record or head["first_bad"] == step:
                self._write_scalars(step, head, packed.lr)
            if packed.watch != "off":
                self._watch(step, parts, packed.watch, head)
        if packed.probe:
            names = self.recorder.names + self.recorder.snapshot_names * packed.snapshot
            arrays = self.recorder.unpack(parts.next(self.recorder.size(names)), names)
            self.write_arrays(step, arrays, "probe_", self.probe_sequences)
        if packed.record:
            self._training_record(step, parts, packed.snapshot)
        assert not parts.values.numel(), "the vector of this step is longer than what was taken from it"
        self._say_failed(step)

    def _say_failed(self, step: int) -> None:
        """Of each statistic that failed, once: in a warning, and as an event with the step."""
        for name, why in (self.recorder.failed | self.parameter_recorder.failed).items():
            if name not in self.failed:
                self.failed.add(name)
                text = f"statistic {name} is left out from here on: {why}"
                self.problem(text)
                self._left_out(step, text)

    def _left_out(self, step: int, text: str) -> None:
        """In run.json at once, with its step; it is among the warnings already."""
        self.writer.event(Event(step, "left_out", None, f"step {step}: {text}").to_dict())

    def _watch(self, step: int, parts: "_Reader", watch: str, head: dict[str, float]) -> None:
        names = self.recorder.watch_names
        arrays = self.recorder.unpack(parts.next(self.recorder.size(names)), names)
        if "resid_max" in arrays:
            self.events(self.residual.look(step, arrays["resid_max"]))
        if head["first_bad"] == step and self.config.nan_policy == "log":  # the others run the step again
            if watch == "residual":
                arrays = {name: arrays[name] for name in ("resid_max", "nan_count", "inf_count") if name in arrays}
            peak_sites = self.recorder.statistics["peak"].sites if "peak" in arrays else ()
            self.events([first_fault(step, arrays, peak_sites, head["loss"], head["grad_norm"])])

    def _training_record(self, step: int, parts: "_Reader", snapshot: bool) -> None:
        if self.n_slopes:
            axes = ("layer",) if self.n_slopes == self.config.model.n_layer else ("shared",)
            self._array("act_slope", step, parts.next(self.n_slopes).numpy().astype(np.float32), axes, "")
        arrays: dict[str, np.ndarray] = {}
        for names in [self.recorder.names] + [self.recorder.snapshot_names] * snapshot:
            arrays |= self.recorder.unpack(parts.next(self.recorder.size(names)), names)
        self.write_arrays(step, arrays, "", self.config.train.batch_size)
        for name, value in self.parameter_recorder.unpack(parts.next(self.parameter_recorder.size())).items():
            unit = self.parameter_recorder.statistics[name].unit
            self._array(name, step, value, self.parameter_recorder.axes(name), unit)
        counts, events = self.heads.look(step, arrays)
        for name, value in counts.items():
            self._array(name, step, value, ("layer",), "heads")
        self.events(events)

    def events(self, events: list[Event]) -> None:
        """Say them, and keep them in run.json."""
        for event in events:
            self.writer.event(event.to_dict())
            self.say(event.text)

    def problem(self, text: str) -> None:
        """Say what the disk did not take; it is among the warnings of run.json in the end."""
        self.views.problems.append(text)
        self.say(f"warning: {text}")

    def missed_checkpoint(self, step: int, text: str) -> None:
        """The same of a checkpoint, whose step is kept in run.json."""
        self.missed.append(step)
        self.writer.status(unsaved_checkpoints=[*self.writer.fields.get("unsaved_checkpoints", []), step])
        self.problem(text)

    def _write_scalars(self, step: int, head: dict[str, float], lr: float) -> None:
        row = {"train/loss": head["loss"], "lr": lr, "grad_norm": head["grad_norm"]}
        if head["bad_loss_rows"]:
            row["bad_loss_rows"] = int(head["bad_loss_rows"])
        if self.config.nan_policy != "raise":
            row["bad_steps"] = int(head["bad_steps"])
        if self.config.train.precision == "fp16":
            row |= {"loss_scale": head["loss_scale"], "scaler_skips": int(head["scaler_skips"])}
        rate = self._recent_rate()
        self.scalars(step, row if rate is None else row | {"tokens_per_second": rate})

    def write_arrays(self, step: int, arrays: dict[str, np.ndarray], prefix: str, sequences: int) -> None:
        for name, value in arrays.items():
            self._array(prefix + name, step, value, self.recorder.axes(name), self.recorder.statistics[name].unit)
        self._array(f"{prefix}elements", step, self.elements(sequences), ("site",), "elements")

    def elements(self, sequences: int) -> np.ndarray:
        """How many numbers `nan_count` looks at, by site: int64 (sites,)."""
        return sequences * elements_by_site(self.config)

    def _array(self, name: str, step: int, value: np.ndarray, axes: tuple[str, ...], unit: str) -> None:
        self.writer.array(name, step, value, axes, unit)
        self.views.array(name, step, value, axes)

    def scalars(self, step: int, row: dict[str, float]) -> None:
        row = row | {"seconds": round(time.monotonic() - self.started, 3)}
        self.writer.scalars(step, row)
        self.views.scalars(step, row)
        news, self.views.news = self.views.news, []
        for text in news:
            self._left_out(step, text)


def pack(*parts: Tensor | None) -> Tensor:
    """One flat float64 vector on the device."""
    return torch.cat([p.detach().flatten().double() for p in parts if p is not None])


def elements_by_site(config: Config) -> np.ndarray:
    """Elements of one sequence at each of `SITES`: int64 (sites,)."""
    T, model = config.data.seq_len or 0, config.model
    sizes = {"attn_probs": model.n_head * T * T, "mlp_hidden": T * (model.n_inner or 0)}
    return np.array([sizes.get(site, T * model.n_embd) for site in SITES], dtype=np.int64)


class _Reader:
    """Takes a flat vector apart from the front."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def next(self, size: int) -> Tensor:
        part, self.values = self.values[:size], self.values[size:]
        assert part.numel() == size, "the vector of this step is shorter than it must be"
        return part

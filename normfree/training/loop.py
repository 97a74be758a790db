"""The training loop.

Everything labelled step s belongs to the weights after s updates: the training loss and the statistics of batch s, the
evaluation and the probe at s, and checkpoint s, which is written before any of them. So a run resumed at s writes again
what was recorded from s on, and ends with the same bytes.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from normfree.config import IGNORED, Config
from normfree.data.batches import Batches, evaluation_rows
from normfree.data.packing import Corpus
from normfree.diagnostics.hooks import Recorder, is_forward
from normfree.diagnostics.inject import Injector
from normfree.diagnostics.parameters import ParameterRecorder
from normfree.diagnostics.ring import Entry, Ring
from normfree.model import Transformer, init_weights
from normfree.tables import STATISTICS
from normfree.training import checkpoint as ckpt
from normfree.training import faults, machine
from normfree.training.alarms import Event
from normfree.training.autopsy import autopsy, skipped
from normfree.training.evaluation import bytes_per_token, evaluate_loss, loss_metrics
from normfree.training.optimizer import (
    build_optimizer,
    clip_divisor,
    gradient_norms,
    moments,
    partly_read,
    peaks,
    set_learning_rate,
    trained,
)
from normfree.training.record import SCALARS, Due, Packed, Record, pack
from normfree.training.schedules import learning_rate
from normfree.training.signals import Preempted, Signals
from normfree.training.step import micro_batches, seed_dropout


class Trainer:
    """One run, from its configuration (resolved) and corpus to a finished run directory."""

    def __init__(self, config: Config, corpus: Corpus, run_dir: Path, device: torch.device) -> None:
        self.config, self.corpus, self.run_dir, self.device = config, corpus, run_dir, device
        seq_len, batch_size, micro = config.data.seq_len, config.train.batch_size, config.train.micro_batch_size
        assert seq_len is not None, "the configuration is not resolved"
        assert micro is not None, "the configuration is not resolved"
        self.micro_batches = batch_size // micro
        self.batches = Batches(corpus.tokens("train"), seq_len, batch_size, config.seed, corpus.chunk_len)
        val = corpus.tokens("val")
        self.eval_rows = evaluation_rows(val, seq_len, config.train.eval_tokens, corpus.chunk_len)
        probe = evaluation_rows(val, seq_len, config.diagnostics.probe_sequences * seq_len, corpus.chunk_len)
        self.probe_idx = torch.from_numpy(probe[: config.diagnostics.probe_sequences, :-1]).to(device)
        self.bytes_per_token = bytes_per_token(self.eval_rows, corpus.tokenizer)
        self.precision = config.train.precision

        torch.manual_seed(config.seed)  # parameters of plug-ins that draw in their constructor
        self.model = Transformer(config.model)
        init_weights(self.model, config.seed)
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, config.optim, machine.choose_fast(config, device))
        self.parameters = trained(self.model)
        self.flag = faults.FiniteFlag(config.nan_policy, device)
        self.optimizer.found_inf = self.flag.mask  # type: ignore[attr-defined]
        lowest = None if config.nan_policy == "log" else 1.0  # log goes on regardless, and so does its scaler
        self.scaler = faults.LossScaler(self.precision == "fp16", device, lowest=lowest)
        self.spikes = faults.SpikeWatch(config.spike_sigma, device)
        self.rollbacks = faults.Rollbacks(config.rollback)
        self.mailbox = faults.Mailbox(device)
        # Hooks before anything is compiled; the injector's first, so that what is planted shows in the record.
        self.injector = Injector(self.model, self.optimizer, config.debug.inject)
        names = config.diagnostics.statistics
        assert names is not None, "the configuration is not resolved"
        kept = [n for n in names if config.diagnostics.snapshot_every or not getattr(STATISTICS[n], "snapshot", False)]
        self.compiled = machine.choose_compile(config, device)
        # A graph with statistics and one without round differently. So under train.deterministic a compiled run has
        # one graph, that of a record, whatever it records.
        self.one_graph = self.compiled and machine.choose_deterministic(config, device)
        beside = [n for n in STATISTICS if is_forward(n)] if self.one_graph else []
        self.recorder = Recorder(self.model, [n for n in kept if is_forward(n)], seq_len, beside)
        self.parameter_recorder = ParameterRecorder(self.model, [n for n in names if not is_forward(n)])
        self.set_watch(machine.choose_watch(config, device))
        if self.compiled:
            self.rehearse()
        self.fast = machine.choose_fast(config, device) and not self.injector.active
        self.partly_read = partly_read(self.model, self.fast)
        self.forward = machine.compiled(self.model, self.compiled)
        self.last_val = float("nan")
        self.signals = Signals()

    def set_watch(self, watch: str) -> None:
        """What is measured at every step, and a ring that holds it."""
        self.watch = watch
        watched = self.recorder.size(self.recorder.watch_names) if watch != "off" else 0
        self.ring = Ring(self.config.diagnostics.ring, len(SCALARS) + watched, self.device)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Measure everything once, eagerly: a statistic that fails is left out before it is part of a graph."""
        self.recorder.start()
        self.model.hidden(torch.zeros(1, self.config.data.seq_len or 1, dtype=torch.int64, device=self.device))
        self.recorder.stop()

    # -- one step -------------------------------------------------------------------------------------------------

    def micro_batch(self, rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Rows (B, T + 1) as contiguous micro-batches of (idx, targets) on the device."""
        return micro_batches(rows, self.micro_batches, self.device)

    def seed_dropout(self, step: int, micro: int) -> None:
        seed_dropout(self.config, step, micro)

    def train_step(self, step: int, due: Due) -> None:
        """Forward, backward, judge, clip, masked update; post the step's numbers without waiting for them."""
        rows = self.batches.rows(step)
        count = int((rows[:, 1:] != IGNORED).sum())
        lr = learning_rate(step, self.config.train.max_steps, self.config.optim) * self.rollbacks.lr_factor(step)
        set_learning_rate(self.optimizer, lr)
        level = "record" if due.record else self.watch
        if level != "off" or self.one_graph:
            self.recorder.start(self.micro_batches, "record" if self.one_graph else level)
        loss, bad_rows = self.backward_passes(step, rows, count)

        self.scaler.unscale_([p.grad for p in self.parameters if p.grad is not None])
        norms = gradient_norms(self.parameters)
        norm = norms.norm()
        overflow = self.scaler.overflowed(norm.isfinite())
        self.injector.before_optimizer(step)
        finite = loss.isfinite() & (norm.isfinite() | overflow) & ~self.spikes.is_spike(loss)
        weight_peaks, state_finite = self.state(due.record)
        finite &= state_finite
        self.flag.judge(finite, step, overflow)

        self.scaler.move(norm.isfinite(), overflow, self.flag.frozen)
        self.spikes.take(loss, finite & ~self.flag.frozen)
        parts = [*self.head(loss, norm, bad_rows)]
        if self.watch != "off":
            parts.append(self.recorder.flat(self.recorder.watch_names))
        self.ring.write(Entry(step, lr, step, level), pack(*parts))
        if due.probe is not None:
            parts.append(due.probe)
        if due.record:
            parts += self.recorded(due.snapshot)
            assert weight_peaks is not None, "a record looks at the weights"
            parts += self.parameter_recorder.before_update(norms, weight_peaks)
        self.recorder.level = "off"
        if self.config.optim.grad_clip:
            self.optimizer.grad_scale = clip_divisor(norm, self.config.optim.grad_clip)  # type: ignore[attr-defined]
        self.optimizer.step()
        if due.record:
            parts += self.parameter_recorder.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        self.injector.undo()
        self.mailbox.post(step, pack(*parts), Packed(lr, due.record, due.probe is not None, due.snapshot, self.watch))

    def backward_passes(self, step: int, rows: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of every micro-batch; the mean loss, and how many of its terms are not finite."""
        loss = torch.zeros((), device=self.device)
        bad_rows = torch.zeros((), dtype=torch.int64, device=self.device)
        for i, (idx, targets) in enumerate(self.micro_batch(rows)):
            self.seed_dropout(step, i)
            self.injector.before_forward(step, i)
            with machine.autocast(self.device, self.precision):
                with self.model.fast_paths(self.fast):
                    out = self.forward(idx, targets)
                part = out.sum / count
            (part * self.scaler.scale).backward()
            loss += part.detach()
            bad_rows += out.bad_rows
        self.injector.after_backward(step)
        return loss, bad_rows

    def recorded(self, snapshot: bool) -> list[Tensor]:
        """What a record holds of the training step, up to the update, in the order that `Record.take` expects."""
        slopes = self.model.slopes()  # packed before the update: they are this step's own
        parts = [] if slopes is None else [slopes.clone()]
        parts.append(self.recorder.flat(self.recorder.names))
        if snapshot:
            parts.append(self.recorder.flat(self.recorder.snapshot_names))
        return parts

    def state(self, record: bool) -> tuple[Tensor | None, Tensor]:
        """Before the update: the largest magnitude of each weight, where it was looked at, and a finite flag, 0-d bool.

        Finite gradients keep finite moments finite. So moments are looked at with a record, for memory gone bad, and
        at every step where `debug.inject` plants something: its fault must stop the run at its own step.
        """
        weights = [p.detach() for p in self.parameters]
        if record or self.injector.active:
            found = peaks(weights + moments(self.optimizer))
            return found[: len(weights)], found.isfinite().all()
        tables = self.partly_read if self.watch != "off" else []
        finite = peaks(tables).isfinite().all() if tables else torch.ones((), dtype=torch.bool, device=self.device)
        return None, finite

    def head(self, loss: Tensor, grad_norm: Tensor, bad_rows: Tensor) -> tuple[Tensor, ...]:
        """The values that `record.SCALARS` names."""
        flag, scaler = self.flag, self.scaler
        return flag.first_bad, flag.bad_steps, loss, grad_norm, bad_rows, scaler.scale, scaler.skipped, flag.in_a_row

    @torch.no_grad()
    def probe(self, snapshot: bool = False) -> Tensor:
        """Statistics of the fixed validation sequences, in eval mode, by the raw module; still on the device."""
        self.model.eval()
        self.recorder.start()
        with machine.autocast(self.device, self.precision):
            self.model.hidden(self.probe_idx)
        self.model.train()
        self.recorder.level = "off"
        return self.recorder.flat(self.recorder.names + self.recorder.snapshot_names * snapshot)

    # -- what happens between steps -------------------------------------------------------------------------------

    def settle(self, record: Record, everything: bool = False) -> None:
        """Write the steps whose numbers have arrived; stop the run at the first bad one."""
        for step, values, packed in self.mailbox.settled(everything):
            record.take(step, values, packed)
            if self.config.nan_policy == "skip" and values[0] == step:
                record.events([skipped(self, step, values)])
            if self.flag.stops(values[0].item(), values[SCALARS.index("bad_in_a_row")].item()):
                fault = autopsy(self, step, values, record, recorded=packed.record)
                raise self.or_back(fault)

    def or_back(self, fault: faults.Diverged) -> Exception:
        """What to raise: `fault` itself, or going back to before it, where the policy says so."""
        back = self.config.nan_policy == "rollback" and not self.rollbacks.exhausted
        return faults.RolledBack(fault) if back else fault

    def evaluate(self, step: int, record: Record) -> None:
        micro = self.config.train.micro_batch_size or 1
        with self.model.fast_paths(self.fast):  # as in training: the logits of a whole micro-batch are never held
            self.last_val = evaluate_loss(self.model, self.eval_rows, micro, self.precision)
        record.scalars(step, loss_metrics(self.last_val, self.bytes_per_token))
        try:
            ckpt.note_best(self.run_dir, step, self.last_val)
        except OSError as error:
            record.problem(f"{self.run_dir}: the best checkpoint was not noted ({error.strerror})")

    def write_checkpoint(self, step: int) -> bool:
        """Returns whether weights and moments are finite."""
        state = self.extra_state()
        return ckpt.save_checkpoint(self.run_dir, step, self.config, self.model, self.optimizer, state)

    def save(self, step: int, record: Record) -> None:
        """A full disk costs this checkpoint, not the run: it is said and counted, and the next one is tried."""
        record.writer.sync()
        try:
            finite = self.write_checkpoint(step)
        except ckpt.NotSaved as error:
            record.missed_checkpoint(step, str(error))
            return
        try:
            ckpt.prune(self.run_dir, self.config.train.keep_checkpoints)
        except OSError as error:
            record.problem(f"{self.run_dir}: old checkpoints were not deleted ({error.strerror})")
        if not finite and self.config.nan_policy != "log":  # no step to come would mend it
            fault = faults.Diverged(step, f"step {step}: weights or optimizer moments are no longer finite.")
            raise self.or_back(fault)

    def extra_state(self) -> dict[str, Tensor]:
        flag = {name: getattr(self.flag, name) for name in ("bad_steps", "first_bad", "in_a_row")}
        return flag | self.scaler.state() | self.spikes.state() | self.rollbacks.state()

    def wait(self, record: Record) -> None:
        """Let the device finish the steps it has; their time is theirs, not the evaluation's."""
        began = time.perf_counter()
        self.settle(record, everything=True)
        if record.tokens:
            record.clock(0, time.perf_counter() - began)

    # -- the loop -------------------------------------------------------------------------------------------------

    def is_due(self, step: int, every: int) -> bool:
        return step == self.config.train.max_steps or (every > 0 and step % every == 0)

    def due(self, step: int) -> Due:
        """What step `step` records; the probe is taken here."""
        diagnostics = self.config.diagnostics
        record = diagnostics.every > 0 and self.is_due(step, diagnostics.every)
        snapshot = record and diagnostics.snapshot_every > 0 and self.is_due(step, diagnostics.snapshot_every)
        return Due(record, snapshot, self.probe(snapshot) if record and diagnostics.probe_sequences else None)

    def post_probe(self, step: int, due: Due) -> None:
        """After the last update: the probe alone, no training step."""
        if due.probe is not None:
            nothing = torch.zeros((), device=self.device)
            values = pack(*self.head(nothing, nothing, nothing), due.probe)
            self.mailbox.post(step, values, Packed(probe=True, snapshot=due.snapshot))

    def fit(self, start: int, record: Record, progress: tqdm) -> None:
        """Train from step `start` to the end, however often the run has to be taken back."""
        if self.config.nan_policy == "rollback" and start == 0:
            try:
                self.save(0, record)  # there is always somewhere to go back to
            except faults.RolledBack as back:  # what it begins with is not finite, and nothing lies before it
                raise back.fault from None
        while True:
            try:
                return self.run_steps(start, record, progress)
            except faults.RolledBack as back:
                start = self.roll_back(back.fault, record)
                progress.update(start - progress.n)

    def roll_back(self, fault: faults.Diverged, record: Record) -> int:
        """Back to the last good checkpoint; the bad step is left out from now on. Returns the step to go on from."""
        self.mailbox.settled(everything=True)  # of steps that were masked, and are done again
        good = ckpt.newest_good(self.run_dir)
        if good is None:  # the first one, which fit writes, could not be written
            raise fault
        self.rollbacks.note(fault.step)
        noted = self.rollbacks.bad_steps.clone()
        start = ckpt.load_training_state(self.model, self.optimizer, self.extra_state(), good[1])
        self.rollbacks.bad_steps.copy_(noted)
        self.flag.clear()
        record.rewind(start)
        text = f"rolled back to step {start} ({len(noted[noted >= 0])} of {self.config.rollback.retries}): {fault}"
        record.events([Event(fault.step, "rollback", None, text)])
        return start

    def run_steps(self, start: int, record: Record, progress: tqdm) -> None:
        config = self.config
        last, tokens = config.train.max_steps, config.train.batch_size * (config.data.seq_len or 0)
        compiled: set[bool] = set()  # the variants, with and without a record: the first step of each compiles
        for step in range(start, last + 1):
            stopped_by = self.signals.received
            if step > start and (stopped_by is not None or self.is_due(step, config.train.checkpoint_every)):
                self.wait(record)
                self.save(step, record)
            if stopped_by is not None:
                raise Preempted(stopped_by, step)
            if self.is_due(step, config.train.eval_every):
                self.wait(record)
                self.evaluate(step, record)
            due = self.due(step)
            if step == last or self.rollbacks.leaves_out(step):
                self.post_probe(step, due)
                progress.update(step < last)
                continue
            began = time.perf_counter()
            self.train_step(step, due)
            first = due.record not in compiled  # its loss is shown at once, and not after the other one has compiled
            self.settle(record, everything=first)
            if not first:
                record.clock(tokens, time.perf_counter() - began)
            compiled.add(due.record)
            progress.update()
            rate = record.tokens_per_second  # NaN before the second step
            shown = f"loss {record.last_loss:.3f}, val {self.last_val:.3f}"
            progress.set_postfix_str(f"{shown}, {rate:,.0f} tokens/s" if rate > 0 else shown, refresh=False)
        self.settle(record, everything=True)

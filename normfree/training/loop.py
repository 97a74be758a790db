"""The training loop.

Everything labelled step s belongs to the weights after s updates: the training loss and the statistics of batch s, the
evaluation and the probe at s, and checkpoint s, which is written before any of them. So a run resumed at s writes again
what was recorded from s on, and ends with the same bytes.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from normfree.config import IGNORED, Config
from normfree.data.batches import Batches, evaluation_rows
from normfree.data.packing import Corpus
from normfree.diagnostics import Recorder
from normfree.model import Transformer, init_weights
from normfree.runs import SITES
from normfree.training import checkpoint as ckpt
from normfree.training import faults, machine
from normfree.training.evaluation import bytes_per_token, evaluate_loss, loss_metrics
from normfree.training.optimizer import GradientNorms, build_optimizer, clip_, set_learning_rate
from normfree.training.record import Packed, Record, pack
from normfree.training.schedules import learning_rate


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
        self.optimizer = build_optimizer(self.model, config.optim)
        self.norms = GradientNorms(self.model, config.model.n_layer)
        self.flag = faults.FiniteFlag(config.nan_policy, device)
        self.optimizer.found_inf = self.flag.mask  # type: ignore[attr-defined]
        lowest = None if config.nan_policy == "log" else 1.0  # log goes on regardless, and so does its scaler
        self.scaler = faults.LossScaler(self.precision == "fp16", device, lowest=lowest)
        self.mailbox = faults.Mailbox(device)
        self.recorder = Recorder(self.model, config.diagnostics.statistics)  # before anything is compiled
        self.forward = machine.compiled(self.model, machine.choose_compile(config, device))
        self.uses_dropout = any((config.model.dropout.embed, config.model.dropout.attn, config.model.dropout.resid))
        self.last_val = float("nan")

    # -- one step -------------------------------------------------------------------------------------------------

    def micro_batch(self, rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Rows (B, T + 1) as contiguous micro-batches of (idx, targets) on the device."""
        tokens = torch.from_numpy(rows)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.chunk(self.micro_batches)]

    def seed_dropout(self, step: int, micro: int) -> None:
        """Dropout of a micro-batch depends on (seed, step, micro-batch) alone: there is no state to save."""
        if self.uses_dropout:
            digest = hashlib.sha256(f"dropout/{self.config.seed}/{step}/{micro}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def train_step(self, step: int, record: bool, probe: Tensor | None) -> None:
        """Forward, backward, judge, clip, masked update; post the step's numbers without waiting for them."""
        rows = self.batches.rows(step)
        count = int((rows[:, 1:] != IGNORED).sum())
        lr = learning_rate(step, self.config.train.max_steps, self.config.optim)
        set_learning_rate(self.optimizer, lr)
        if record:
            self.recorder.start(self.micro_batches)
        total = torch.zeros((), device=self.device)
        for i, (idx, targets) in enumerate(self.micro_batch(rows)):
            self.seed_dropout(step, i)
            with machine.autocast(self.device, self.precision):
                loss = self.forward(idx, targets).sum / count
            (loss * self.scaler.scale).backward()
            total += loss.detach()
        flat = self.recorder.stop() if record else None

        self.scaler.unscale_([p.grad for p in self.norms.parameters if p.grad is not None])
        norm, by_layer = self.norms()
        grads_finite = norm.isfinite()
        overflow = self.scaler.overflowed(grads_finite)
        self.flag.judge(total.isfinite() & (grads_finite | overflow), step, overflow)
        if self.config.optim.grad_clip:
            clip_(self.norms.parameters, norm, self.config.optim.grad_clip)
        slopes = self.model.slopes() if record else None
        # Packed before the update: the slopes are this step's own.
        values = pack(*self.head(total, norm), probe, flat, by_layer if record else None, slopes)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mailbox.post(step, values, Packed(lr, train=record, probe=probe is not None))

    def head(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, ...]:
        """The values that `record.SCALARS` names."""
        return self.flag.first_bad, self.flag.bad_steps, loss, grad_norm, self.scaler.scale, self.scaler.skipped

    @torch.no_grad()
    def probe(self) -> Tensor:
        """Statistics of the fixed validation sequences, in eval mode, by the raw module; still on the device."""
        self.model.eval()
        self.recorder.start()
        with machine.autocast(self.device, self.precision):
            self.model.hidden(self.probe_idx)
        self.model.train()
        return self.recorder.stop()

    # -- what happens between steps -------------------------------------------------------------------------------

    def settle(self, record: Record, everything: bool = False) -> None:
        """Write the steps whose numbers have arrived; stop the run at the first bad one."""
        for step, values, packed in self.mailbox.settled(everything):
            record.take(step, values, packed)
            if self.config.nan_policy == "raise" and values[0] >= 0:
                raise self.autopsy(step, values, record, recorded=packed.train)

    def autopsy(self, step: int, values: Tensor, record: Record, recorded: bool) -> faults.Diverged:
        """Where the bad step went wrong: its forward pass once more, with the weights still as they were before it."""
        self.recorder.start(self.micro_batches)
        with torch.no_grad(), machine.autocast(self.device, self.precision):
            for i, (idx, _) in enumerate(self.micro_batch(self.batches.rows(step))):
                self.seed_dropout(step, i)
                self.model.hidden(idx)
        flat = self.recorder.stop().cpu()
        if not recorded:
            record.write_arrays(step, flat, "", self.config.train.batch_size)
        loss, norm = values[2].item(), values[3].item()
        return faults.Diverged(
            step,
            f"step {step}: the training loss is {loss:g} and the gradient norm {norm:g}; {self._where(flat)} "
            f"The weights are as they were before that step. Try a lower optim.lr (now {self.config.optim.lr:g}) or a "
            f"longer optim.warmup_steps (now {self.config.optim.warmup_steps}); nan_policy=skip or log go on.",
        )

    def _where(self, flat: Tensor) -> str:
        arrays = self.recorder.unpack(flat)
        counts = [arrays[name] for name in ("nan_count", "inf_count") if name in arrays]
        if not counts:
            return "diagnostics.statistics has no nan_count, so the layer is not known."
        bad = np.sum(counts, axis=0)[SITES.index("block")] > 0
        if not bad.any():
            return "every block's output is finite, so it arose in the head, the loss or the backward pass."
        return f"the first block with NaN or Inf in its output is block {int(bad.argmax())}."

    def evaluate(self, step: int, record: Record) -> None:
        micro = self.config.train.micro_batch_size or 1
        self.last_val = evaluate_loss(self.model, self.eval_rows, micro, self.precision)
        record.scalars(step, loss_metrics(self.last_val, self.bytes_per_token))

    def write_checkpoint(self, step: int) -> bool:
        """Returns whether weights and moments are finite."""
        state = self.extra_state()
        return ckpt.save_checkpoint(self.run_dir, step, self.config, self.model, self.optimizer, state)

    def save(self, step: int) -> None:
        finite = self.write_checkpoint(step)
        ckpt.prune(self.run_dir, self.config.train.keep_checkpoints)
        if not finite and self.config.nan_policy == "raise":
            raise faults.Diverged(step, f"step {step}: weights or optimizer moments are no longer finite.")

    def extra_state(self) -> dict[str, Tensor]:
        return self.scaler.state() | {"bad_steps": self.flag.bad_steps, "first_bad": self.flag.first_bad}

    def wait(self, record: Record) -> None:
        """Let the device finish the steps it has; their time is theirs, not the evaluation's."""
        began = time.perf_counter()
        self.settle(record, everything=True)
        if record.tokens:
            record.clock(0, time.perf_counter() - began)

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self, start: int, record: Record, progress: tqdm) -> None:
        config = self.config
        last, tokens = config.train.max_steps, config.train.batch_size * (config.data.seq_len or 0)

        compiled: set[bool] = set()  # the variants, with and without statistics: the first step of each compiles

        def due(step: int, every: int) -> bool:
            return step == last or (every > 0 and step % every == 0)

        for step in range(start, last + 1):
            if due(step, config.train.checkpoint_every) and step > start:
                self.wait(record)
                self.save(step)
            if due(step, config.train.eval_every):
                self.wait(record)
                self.evaluate(step, record)
            recording = config.diagnostics.every > 0 and due(step, config.diagnostics.every)
            probe = self.probe() if recording and config.diagnostics.probe_sequences else None
            if step == last:
                if probe is not None:
                    nothing = torch.zeros((), device=self.device)
                    self.mailbox.post(step, pack(*self.head(nothing, nothing), probe), Packed(probe=True))
                break
            began = time.perf_counter()
            self.train_step(step, recording, probe)
            self.settle(record)
            if recording in compiled:
                record.clock(tokens, time.perf_counter() - began)
            compiled.add(recording)
            progress.update()
            progress.set_postfix_str(
                f"loss {record.last_loss:.3f}, val {self.last_val:.3f}, {record.tokens_per_second:,.0f} tokens/s",
                refresh=False,
            )
        self.settle(record, everything=True)

"""A run around the training loop: what it says at the beginning, what it keeps when it stops, what at the end."""

import contextlib
import math
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from normfree import heads
from normfree.config import Config
from normfree.data.packing import Corpus
from normfree.data.tokenizer import save_tokenizer
from normfree.errors import EXIT_DIRECTORY, EXIT_DISK, EXIT_DIVERGED, EXIT_MEMORY, EXIT_OK, UserError
from normfree.generate import complete
from normfree.identity import other_differences
from normfree.records import RunWriter, truncate
from normfree.runs import checkpoint_name, is_run, load_run, norm_label
from normfree.training import checkpoint as ckpt
from normfree.training import machine
from normfree.training.alarms import Event
from normfree.training.autopsy import keep_postmortem
from normfree.training.faults import Diverged
from normfree.training.locking import alone
from normfree.training.loop import Trainer
from normfree.training.postmortem import advice, fault_entry, how_to_replay, what_next
from normfree.training.provenance import provenance, versions
from normfree.training.record import Record
from normfree.training.signals import Preempted
from normfree.training.starting import RunResult, default_run_dir, ended, starting_point
from normfree.training.summary import closing_lines, closing_table
from normfree.training.views import Views

SAMPLE_TOKENS = 60
CPU_FLOPS = 1e11  # a second: what two cores do
NO_MEMORY = ("can't allocate memory", "not enough memory")  # how the CPU's allocator says so
REAL_THING = "python run.py experiment=paper_gpt2 model=normfree act=relu"


@contextlib.contextmanager
def memory_in_words(config: Config) -> Iterator[None]:
    """A device without enough memory is a message that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one, and the CPU's allocator's
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(text in str(error) for text in NO_MEMORY):
            raise
        raise UserError(
            f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]}\nLower train.micro_batch_size="
            f"{config.train.micro_batch_size} (train.batch_size may stay: gradients are accumulated), data.seq_len, or "
            "the size of the model.",
            EXIT_MEMORY,
        ) from error


def train(config: Config, corpus: Corpus, plugins: list[dict[str, str]] | None = None) -> RunResult:
    """Train one run to its end; `config` is validated and resolved, vocabulary included.

    Returns a `RunResult`, also when training diverged; raises `UserError` for what a user can mend. Never exits the
    process, and leaves no process-wide switch behind.
    """
    plugins = plugins or []
    device = machine.choose_device(config)
    config.train.precision = machine.choose_precision(config, device)
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    console = Console(stderr=True, markup=False, highlight=False)
    before = ended(config, run_dir, plugins)
    if before is not None:
        return _say_again(before, console)
    checkpoint = starting_point(config, run_dir, plugins)
    with machine.process_flags(machine.choose_deterministic(config, device)):
        with memory_in_words(config):
            trainer = Trainer(config, corpus, run_dir, device)
        origin = None
        if checkpoint is None and config.init_from is not None:
            origin = ckpt.find_checkpoint(config.init_from)
            ckpt.load_weights(trainer.model, origin)
        # Up to here nothing was written. Now hold the directory, and look again: another process may have been there.
        with alone(run_dir):
            ckpt.sweep(run_dir)
            before = ended(config, run_dir, plugins)
            if before is not None:
                return _say_again(before, console)
            checkpoint = starting_point(config, run_dir, plugins)
            return _train(trainer, checkpoint, console, plugins, origin)


def _say_again(before: RunResult, console: Console) -> RunResult:
    """The same command again: what that run came to, and what can be done."""
    console.print(f"{before.run_dir} is {before.status} already.", style="bold", soft_wrap=True)
    if before.status == "finished":
        console.print(f"To train it longer: python run.py resume={before.run_dir} train.max_steps=N", soft_wrap=True)
    else:
        status = load_run(before.run_dir).status
        console.print(f"{status.get('reason')}\nOther settings make another run.", soft_wrap=True)
        if postmortem := (status.get("fault") or {}).get("postmortem"):
            console.print(how_to_replay(before.run_dir / postmortem), soft_wrap=True)
    return before


def _train(
    trainer: Trainer,
    checkpoint: Path | None,
    console: Console,
    plugins: list[dict[str, str]],
    origin: Path | None = None,
) -> RunResult:
    """`origin`: the checkpoint of `init_from` whose weights the model has, where the run begins."""
    config, corpus, run_dir, device = trainer.config, trainer.corpus, trainer.run_dir, trainer.device
    start = 0
    if checkpoint is not None:
        start = ckpt.load_training_state(trainer.model, trainer.optimizer, trainer.extra_state(), checkpoint)
    config.resume = None  # done; the record is that of one run, however often it was interrupted
    fresh = dict.fromkeys(("reason", "last_step", "tokens_per_second", "sample", "val/loss", "fault"))
    earlier = load_run(run_dir).status if is_run(run_dir) else {}
    changed = other_differences(config, load_run(run_dir).config) if is_run(run_dir) else []
    events = [  # a rollback that the checkpoint does not know of will be met again
        event
        for event in earlier.get("events", [])
        if (trainer.rollbacks.leaves_out(event["step"]) if event["kind"] == "rollback" else event["step"] < start)
    ]
    if changed:
        text = f"goes on from step {start} with other settings: {'; '.join(changed)}"
        events.append(Event(start, "settings", None, text).to_dict())
    writer = _begin(run_dir, start, config, corpus)
    counts = trainer.model.parameter_counts()
    writer.status(
        status="running",
        warnings=[],
        events=events,
        unsaved_checkpoints=[step for step in earlier.get("unsaved_checkpoints", []) if step < start],
        **fresh,
        started_from_step=start,
        parameters=counts,
        norms=norm_label(config),
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        threads=torch.get_num_threads(),
        compiled=trainer.compiled,
        fast=trainer.fast,
        corpus={"fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.name},
        versions=versions(),
        **provenance(),
        plugins=plugins,
        origin=ckpt.identity(origin) if origin else earlier.get("origin"),
    )
    console.print(
        f"{config.name} ({norm_label(config)}): {counts['total']:,} parameters, {counts['non_embedding']:,} "
        f"without embeddings, {counts['trainable']:,} trainable; {_machine(trainer)}; {run_dir}"
        + (f"; going on from step {start}" if start else ""),
        soft_wrap=True,
    )
    if note := _long_on_a_cpu(trainer, counts["total"], start):
        console.print(note)
    ceiling = heads.entropy_ceiling(config.data.seq_len or 1)
    views = Views(run_dir, config, ceiling, start)
    slopes = trainer.model.slopes()
    n_slopes = 0 if slopes is None else slopes.numel()
    record = Record(
        *(config, trainer.recorder, trainer.parameter_recorder, writer, views, len(trainer.probe_idx), n_slopes),
        say=lambda text: tqdm.write(text, file=sys.stderr),
    )
    seconds = 0.2 if sys.stderr.isatty() else 60  # a log file gets a line a minute
    try:
        with (
            memory_in_words(config),
            trainer.signals.caught(),
            tqdm(
                total=config.train.max_steps, initial=start, unit="step", mininterval=seconds, dynamic_ncols=True
            ) as bar,
        ):
            trainer.fit(start, record, bar)
        return _finish(trainer, record, console)
    except Diverged as error:
        trainer.flag.clear()
        try:
            trainer.write_checkpoint(error.step)  # the state before the bad step
        except ckpt.NotSaved as problem:
            record.missed_checkpoint(error.step, str(problem))
        directory = _keep_postmortem(trainer, record, error, plugins)
        _close(trainer, record, status="diverged", last_step=error.step, reason=_reason(config, error))
        _say_diverged(config, error, directory, console)
        return RunResult("diverged", EXIT_DIVERGED, math.nan, run_dir)
    except Preempted as stop:
        name = signal.Signals(stop.signum).name
        where = "the last checkpoint" if stop.step in record.missed else "there"
        reason = f"{name} after {stop.step} steps; the same command goes on from {where}"
        writer.status(status="preempted", last_step=stop.step, reason=reason)
        record.views.finish({})
        console.print(f"preempted: {reason}.", style="bold", soft_wrap=True)
        return RunResult("preempted", stop.exit_code, math.nan, run_dir)
    except BaseException as error:
        writer.status(status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed", reason=repr(error))
        raise
    finally:
        record.writer.close()


def _machine(trainer: Trainer) -> str:
    """Device, precision and paths, as the first line of a run shows them."""
    words = [trainer.device.type, trainer.config.train.precision]
    words += ["compiled"] if trainer.compiled else []
    words += ["fused kernels"] if trainer.fast else []
    return ", ".join(words)


def _long_on_a_cpu(trainer: Trainer, parameters: int, start: int) -> str | None:
    """What somebody should know who starts a job for a GPU without one."""
    train = trainer.config.train
    tokens = (train.max_steps - start) * train.batch_size * (trainer.config.data.seq_len or 0)
    hours = 6 * parameters * tokens / CPU_FLOPS / 3600
    if trainer.device.type != "cpu" or hours < 3:
        return None
    return (
        f"This is a job for a GPU, and runs on the CPU: of the order of {hours:,.0f} hours. size=nano, or fewer or "
        "smaller steps (train.max_steps, train.batch_size), are for a try."
    )


def _begin(run_dir: Path, start: int, config: Config, corpus: Corpus) -> RunWriter:
    """Cut the record off at step `start`, and write what a run cannot be without. Raises `UserError`."""
    try:
        truncate(run_dir, start)
        writer = RunWriter(run_dir, keep_going=True)
        writer.config(config)
        save_tokenizer(corpus.tokenizer, run_dir / "tokenizer")
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}.", EXIT_DIRECTORY) from error
    return writer


def _keep_postmortem(trainer: Trainer, record: Record, error: Diverged, plugins: list[dict[str, str]]) -> Path | None:
    """The postmortem, and `fault` in run.json. That it could not be written is a warning beside the divergence."""
    if error.fault is None:
        return None
    checkpoint = trainer.run_dir / "checkpoints" / checkpoint_name(error.step)
    directory = None
    try:
        directory = keep_postmortem(trainer, error, checkpoint, plugins)
    except (OSError, UserError) as problem:
        record.views.problems.append(f"postmortem of step {error.step}: {problem}")
    record.writer.status(fault=fault_entry(error.fault.finding, error.step, directory, trainer.run_dir))
    return directory


def _reason(config: Config, error: Diverged) -> str:
    """For run.json: what happened, and what to try where that is known."""
    if error.fault is None:
        return str(error)
    return f"{error} What to try: {'; '.join(advice(config, error.step, error.fault.finding))}."


def _say_diverged(config: Config, error: Diverged, directory: Path | None, console: Console) -> None:
    console.print(f"diverged at {error}", style="bold red", soft_wrap=True)
    if directory is not None:
        console.print(f"postmortem: {directory}", soft_wrap=True)
    if error.fault is not None:
        console.print(what_next(config, error.step, error.fault.finding, directory), soft_wrap=True)


def _close(trainer: Trainer, record: Record, **status: Any) -> None:
    """Write how it ended, finish the views, draw the figures; what fails of these is noted, never raised."""
    record.writer.status(**status)
    record.views.finish({"val/loss": trainer.last_val})
    warnings = list(record.views.problems)
    if trainer.config.log.figures:
        from plotting import draw_all

        drawn = draw_all(load_run(trainer.run_dir), trainer.run_dir / "figures")
        warnings += [f"figure {name}: {error}" for name, error in drawn.items() if isinstance(error, Exception)]
    record.writer.status(warnings=warnings + record.writer.losses())


def _finish(trainer: Trainer, record: Record, console: Console) -> RunResult:
    config = trainer.config
    text = _sample(trainer)
    unsaved = config.train.max_steps in record.missed
    _close(
        trainer,
        record,
        status="unsaved" if unsaved else "finished",
        last_step=config.train.max_steps,
        **({"reason": "the last checkpoint could not be written"} if unsaved else {}),
        tokens_per_second=round(record.tokens_per_second, 1),
        sample=text,
        **{"val/loss": trainer.last_val},
    )
    if not record.writer.losses():  # else what the table is made of may be missing
        run = load_run(trainer.run_dir)
        console.print(closing_table(run, None if record.last_step is None else record.last_loss))
        for line in closing_lines(run):
            console.print(line, soft_wrap=True)
    console.print("sample: ", end="", style="bold")
    console.print(text)
    for warning in record.writer.fields["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if unsaved:
        console.print(
            "The last checkpoint could not be written, so the run is not finished: make room and run the same command "
            "again. It goes on from the last checkpoint.",
            style="bold red",
        )
        return RunResult("unsaved", EXIT_DISK, trainer.last_val, trainer.run_dir)
    if trainer.device.type == "cpu":
        console.print(f"The real thing, on a GPU: {REAL_THING}", soft_wrap=True)
    return RunResult("finished", EXIT_OK, trainer.last_val, trainer.run_dir)


def _sample(trainer: Trainer) -> str:
    """One continuation of the prompt; under nan_policy=log the weights may be past sampling from, and that is said."""
    config = trainer.config
    try:
        return complete(
            trainer.model, trainer.corpus.tokenizer, config.log.sample_prompt, SAMPLE_TOKENS, seed=config.seed
        )
    except UserError as error:
        return f"(none: {error})"

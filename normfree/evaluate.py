"""What a checkpoint is worth and what its attention does, over a whole split, as a run directory of its own.

    python -m normfree.evaluate RUN|CHECKPOINT|HF_FOLDER [--out DIR] [--split val|val_package|train] [...]

Written: the loss of the split, its perplexity and bits per byte; `position_loss` (T,); `probe_attn_entropy` (n_layer,
n_head); `position_entropy` (n_layer, n_head, T); NaN and Inf counts. So every figure can be drawn for any checkpoint:

    python -m normfree.evaluate folder/of/gpt2 --path my_texts --seq-len 1024
    python plotting/entropy_heatmap.py runs/evaluate-gpt2
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normfree.config import Config, DataConfig, ModelConfig, resolve, resolve_vocabulary
from normfree.data.batches import evaluation_rows
from normfree.data.packing import Corpus, prepare
from normfree.data.tokenizer import check_tokenizer, require_same_tokenizer
from normfree.errors import EXIT_CHECKPOINT, EXIT_DIRECTORY, EXIT_OK, UserError
from normfree.generate import check_device
from normfree.interop.huggingface import from_hf, is_hf_folder
from normfree.measure import Measurement, measure_split
from normfree.model import Transformer
from normfree.plugins import load_plugins
from normfree.records import RunWriter
from normfree.rules import validate
from normfree.runs import EVALUATION, is_checkpoint, is_evaluation, is_run, load_run, norm_label
from normfree.training import checkpoint as ckpt
from normfree.training.evaluation import bytes_per_token, loss_metrics
from normfree.training.machine import DTYPES
from normfree.training.provenance import versions
from normfree.training.record import elements_by_site

ASKED = ("split", "data", "path", "tokenizer", "seq_len", "max_tokens", "precision")  # options that change numbers
SPLITS = ("val", "val_package", "train")


@dataclass
class Subject:
    """What is evaluated: the model, what it is called, and the text that belongs to it."""

    origin: Path  # a checkpoint or a Hugging Face folder
    model: Transformer
    config: Config
    step: int
    out: Path  # where the evaluation goes unless --out says otherwise
    tokenizer: Path | None = None  # the run's own, as it saved it; None: the user chose the tokenizer


def load_subject(path: Path, tokenizer: str | None) -> Subject:
    """Read a run (its newest good checkpoint), a checkpoint or a Hugging Face folder."""
    if is_run(path) or is_checkpoint(path):
        if tokenizer is not None:
            raise UserError("--tokenizer is for a Hugging Face folder; a run has its own.")
        return _of_checkpoint(ckpt.find_checkpoint(path).resolve())
    if is_hf_folder(path):
        return _of_hf_folder(path, tokenizer)
    raise UserError(
        f"{path} is neither a run directory, nor a checkpoint, nor a Hugging Face folder (config.json and "
        "model.safetensors).",
        EXIT_CHECKPOINT,
    )


def _of_checkpoint(checkpoint: Path) -> Subject:
    run_dir = checkpoint.parent.parent
    if not is_run(run_dir):
        raise UserError(f"{checkpoint} lies outside its run, whose tokenizer is needed.", EXIT_CHECKPOINT)
    config = ckpt.load_config(checkpoint)
    step = ckpt.verify(checkpoint)["step"]
    config.name = f"{load_run(run_dir).name} step {step}"
    out = run_dir / "evaluations" / checkpoint.name
    return Subject(checkpoint, ckpt.load_model(checkpoint), config, step, out, run_dir / "tokenizer")


def _of_hf_folder(folder: Path, tokenizer: str | None) -> Subject:
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer.json")
        if not Path(tokenizer).is_file():
            raise UserError(f"{folder} has no tokenizer.json; name one with --tokenizer (a path, gpt2, bytes, ...).")
    model = from_hf(folder)
    name = folder.resolve().name
    config = Config(name=name, model=model.config, data=DataConfig(tokenizer=tokenizer))
    return Subject(folder.resolve(), model, config, 0, Path("runs") / f"evaluate-{name}")


def choose_data(subject: Subject, a: argparse.Namespace) -> None:
    """Put the options about the text into the subject's configuration, and resolve and check it."""
    data = subject.config.data
    other_text = a.data is not None or a.path is not None
    if other_text:
        data.source, data.path = a.data or "files", a.path
        data.max_documents = None
    if subject.tokenizer is not None and (other_text or not _is_here(data)):
        data.tokenizer = str(subject.tokenizer)  # one that was trained would be trained anew on other text
    if a.seq_len is not None:
        data.seq_len = a.seq_len
    if other_text or (a.seq_len is not None and data.chunks == "original"):
        data.fingerprint = None  # the run's own corpus is not what is asked for
    # Imported models may have shapes that cannot be trained from a configuration, so only what is new is checked.
    validate(Config(data=data, model=ModelConfig(block_size=subject.config.model.block_size)))
    subject.config = resolve(subject.config)
    if a.split != "val":
        subject.config.name = f"{subject.config.name} ({a.split})"
        subject.out = subject.out.with_name(f"{subject.out.name}-{a.split}")


def _is_here(data: DataConfig) -> bool:
    """Whether the tokenizer can be loaded by the name that the run knew it by."""
    try:
        check_tokenizer(data)
    except UserError:
        return False
    return True


def open_corpus(subject: Subject) -> Corpus:
    """The text as tokens of the model's own tokenizer, else `UserError`."""
    config = subject.config
    corpus = prepare(config.data, report=lambda line: print(line, file=sys.stderr))
    if subject.tokenizer is not None:
        require_same_tokenizer(f"{config.name}", subject.tokenizer, corpus.tokenizer)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    config.data.fingerprint = corpus.fingerprint
    return corpus


# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(out: Path, asked: dict[str, Any]) -> Iterator[Path]:
    """A directory to write under that becomes `out` at the end. An older evaluation gives way, nothing else does;
    `asked`: only one that was asked the same, where this names anything.
    """
    if out.is_symlink() or (out.exists() and not (is_run(out) and is_evaluation(load_run(out)))):
        raise UserError(f"{out} exists and is no evaluation. Name another directory with --out.", EXIT_DIRECTORY)
    before = load_run(out).status.get("asked", asked) if out.exists() else asked
    if other := [f"{name}: {before.get(name)}" for name, value in asked.items() if before.get(name) != value]:
        raise UserError(
            f"{out} is another evaluation ({', '.join(other)}). Name a directory with --out.", EXIT_DIRECTORY
        )
    temporary = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}.", EXIT_DIRECTORY) from error
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def metrics_of(result: Measurement, bytes_per_token: float, split: str) -> dict[str, float]:
    """val/loss, val/perplexity, val/bits_per_byte, under the name of the split."""
    values = loss_metrics(result.loss, bytes_per_token)
    return {name.replace("val/", f"{split}/"): value for name, value in values.items()}


def write(directory: Path, config: Config, step: int, result: Measurement, metrics: dict[str, float]) -> None:
    """The record of an evaluation, in the form of a run's."""
    writer = RunWriter(directory)
    writer.config(config)
    writer.scalars(step, metrics)
    writer.array("probe_attn_entropy", step, result.entropy, ("layer", "head"), "nats")
    writer.array("position_entropy", step, result.position_entropy, ("layer", "head", "position"), "nats")
    writer.array("position_loss", step, result.position_loss, ("position",), "nats")
    for name, value in result.counts.items():
        writer.array(f"probe_{name}", step, value, ("site", "layer"), "elements")
    writer.array("probe_elements", step, result.sequences * elements_by_site(config), ("site",), "elements")
    writer.close()


def run(a: argparse.Namespace) -> str:
    """Evaluate as the command line says; returns what to tell the user."""
    _check_options(a)
    plugins = load_plugins(a.plugin)
    subject = load_subject(a.subject, a.tokenizer)
    choose_data(subject, a)
    config = subject.config
    corpus = open_corpus(subject)
    tokens = corpus.tokens(a.split)
    assert config.data.seq_len is not None, "the configuration is not resolved"
    rows = evaluation_rows(tokens, config.data.seq_len, a.max_tokens or len(tokens), corpus.chunk_len)
    out = a.out or subject.out
    asked = {name: getattr(a, name) for name in ASKED} | {"origin": str(subject.origin)}
    with replacing(out, {} if a.out else asked) as directory:  # a directory that was typed is meant
        result = measure_split(subject.model.to(a.device), rows, a.batch_size, a.precision)
        part = a.max_tokens is not None  # a split's beginning is other text than all of it
        ratio = bytes_per_token(rows, corpus.tokenizer) if part else corpus.bytes_per_token(a.split)
        metrics = metrics_of(result, ratio, a.split)
        write(directory, config, subject.step, result, metrics)
        RunWriter(directory).status(**_status(a, subject, corpus, result), asked=asked, plugins=plugins, **metrics)
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return f"{config.name}: {numbers}; {result.tokens:,} tokens of {result.sequences:,} sequences\n{out}"


def _check_options(a: argparse.Namespace) -> None:
    for option in ("batch_size", "max_tokens"):
        value = getattr(a, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value} must be at least 1.")
    check_device(a.device)


def _status(a: argparse.Namespace, subject: Subject, corpus: Corpus, result: Measurement) -> dict[str, Any]:
    return {
        "status": "finished",
        "kind": EVALUATION,  # such a directory is replaced by the same command again
        "last_step": subject.step,
        "reason": None,
        "subject": str(a.subject),
        "split": a.split,
        "sequences": result.sequences,
        "tokens": result.tokens,
        "parameters": subject.model.parameter_counts(),
        "norms": norm_label(subject.config),
        "device": a.device,
        "precision": a.precision,
        "threads": torch.get_num_threads(),
        "corpus": {"fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.name},
        "versions": versions(),
    }


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m normfree.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("subject", type=Path, metavar="RUN|CHECKPOINT|HF_FOLDER", help="a run: its newest good checkpoint")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/evaluations/..., or runs/evaluate-HF_FOLDER")
    p.add_argument("--split", choices=SPLITS, default="val", help="default: val")
    p.add_argument("--data", metavar="SOURCE", help="other text than the run's: a data.source, as in run.py")
    p.add_argument("--path", metavar="PATH", help="data.path: a file, a folder or a glob (implies --data files)")
    p.add_argument("--tokenizer", metavar="NAME", help="for a Hugging Face folder; default: its tokenizer.json")
    p.add_argument("--seq-len", type=int, metavar="T", help="default: the run's; else 128, or block_size if less")
    p.add_argument("--max-tokens", type=int, metavar="N", help="only about so many tokens (default: the whole split)")
    p.add_argument("--batch-size", type=int, default=8, metavar="B", help="sequences a forward pass (default: 8)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="default: fp32, however it was trained")
    p.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help="choices of your own, as in run.py")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. A user's mistake is one message and its exit code."""
    try:
        print(run(_parser().parse_args(argv)))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

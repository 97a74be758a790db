"""One process of experiments/relu_revival.py: trains cells by `run.py`'s own main, evaluates them, keeps the results.

    PYTHONPATH=experiments python -m revival.cell TASKS.json

TASKS.json: {"out", "scale", "runs", "keep", "commit", "began", "workers", "cells": [...]}, written by process.py
beside this. A result is appended as soon as its cell is done, so that a process that is killed loses only the one it is
at.

Lost, as fixed before the runs: the probe's forward pass is not finite at ten of its passes in a row, or the final
validation loss is above the unigram entropy. Cells run under nan_policy=skip: a step whose loss or gradient is not
finite leaves the weights as they are, and the next batch is tried. The probe passes every ten steps, so that ten in a
row that are not finite span as many attempts as the trainer takes to give a run up (100 bad steps in a row); a run that
it gave up has no final loss, and is lost. Cells of rung D stop at the first bad step or go on regardless instead; the
same rules call them lost, and a final loss that is not finite is above the unigram entropy.
"""

import gc
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfree.cli import main as run_main
from normfree.data.batches import evaluation_rows
from normfree.data.packing import Corpus, prepare
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.measure import measure_split
from normfree.model import Transformer
from normfree.runs import Run, load_run
from normfree.training.checkpoint import find_checkpoint, load_model
from normfree.training.evaluation import bytes_per_token
from revival import records as store
from revival.heads import cost_of_heads
from revival.trace import account, bad_steps, trajectories

PROBES = 10  # of the probe's passes in a row that are not finite: lost
BATCH = 128  # sequences a forward pass
ENDED = ("finished", "diverged")
HELD_OUT = ("val", "val_package")


def perform(task: dict[str, Any], runs: Path, keep: bool, began: float | None = None) -> dict[str, Any]:
    """Train and evaluate a cell: its record. Raises SystemExit where the run came to no end.

    `began`: by the monotonic clock, when its process was started; None: now, as of a cell that follows another.
    """
    began = time.monotonic() if began is None else began
    run_dir = runs / f"{task['name'].replace('/', '_').replace(':', '_')}-{task['settings']}"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    words = {word.partition("=")[0]: word for word in (*task["words"], *task["place"], f"run_dir={run_dir}")}
    code = run_main(list(words.values()))
    run = load_run(run_dir)
    if run.status.get("status") not in ENDED:
        raise SystemExit(f"{task['name']}: the run is {run.status.get('status')} (exit code {code})")
    record = {name: task[name] for name in ("key", "name", "rung", "arm", "lr", "seed", "tuning", "settings", "words")}
    record |= provenance(run) | trajectories(run) | {"bad_steps": bad_steps(run)}
    if torch.cuda.is_available():
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.empty_cache()  # what training held, for cells beside this one
    trained = time.monotonic()
    record |= judged(run, task)
    record |= clock(
        run, time.monotonic() - began, time.monotonic() - trained, record.get("heads", {}).get("seconds", 0.0)
    )
    if not keep:
        shutil.rmtree(run_dir)
    return record


def clock(run: Run, seconds: float, judging: float, heads: float) -> dict[str, Any]:
    """`seconds` of a cell, and where they went.

    `start` is what the rest leaves: imports, text, building the model, closing the run. `first_steps` ends with the
    second step: one with a record and one without have been compiled. What an earlier process trained is not counted.
    """
    began = run.status.get("started_from_step", 0)
    steps, times = run.series("seconds")
    last, second = times[steps >= began].max(initial=0.0), times[steps == began + 1].max(initial=0.0)
    if last > seconds - judging:  # it was at its end before this process began
        last = second = 0.0
    parts = {"first_steps": second, "training": last - second, "evaluation": judging - heads, "heads": heads}
    parts = {"start": seconds - sum(parts.values()), **parts}
    return {"seconds": round(seconds, 1), "clock": {name: round(float(part), 1) for name, part in parts.items()}}


def provenance(run: Run) -> dict[str, Any]:
    """What ran: shape, text, code and machine."""
    config, status = run.config, run.status
    T, steps = config.data.seq_len or 0, config.train.max_steps
    model = config.model
    shape = {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd, "T": T}
    tokens = status.get("last_step", 0) * config.train.batch_size * T
    return shape | {
        "norm": model.norm,
        "act": model.act,
        "final_norm": model.final_norm,
        "parameters": status["parameters"],
        "steps": steps,
        "last_step": status.get("last_step"),
        "planned_tokens": steps * config.train.batch_size * T,
        "tokens": tokens,
        "fingerprint": status["corpus"]["fingerprint"],
        "tokenizer": Path(status["corpus"]["tokenizer"]).name,
        "precision": config.train.precision,
        "device": status["device"],
        "tokens_per_second": status.get("tokens_per_second"),
        "commit": status["commit"],
        "versions": status["versions"],
    }


def judged(run: Run, task: dict[str, Any]) -> dict[str, Any]:
    """Losses, entropy and the verdict lost or finished."""
    corpus = prepare(run.config.data, lambda text: None)
    T, batch = run.config.data.seq_len or 0, run.config.train.batch_size
    unique = len(corpus.tokens("train"))
    found: dict[str, Any] = {"unique_tokens": unique}
    found["epochs"] = round(run.config.train.max_steps * batch * T / unique, 4)
    rows, other_rows = report_rows(corpus, "val", T, task), tuning_rows(corpus, T, task)
    found["unigram_entropy"] = unigram_entropy(corpus, rows)
    found["losses"] = quarters(run)
    found["tuning_loss"] = found["losses"]["100"]
    where = account(run, PROBES)
    model = weights(run, found["losses"]["100"]) if where is None else None
    if model is not None:
        found |= evaluate(model, corpus, rows, other_rows, T, task)
        where = too_high(found)
    elif where is None:
        step = run.status["last_step"]
        where = {"step": step, "why": "final validation loss is not finite, nor are the weights that were kept"}
    if where is not None:
        return found | {"status": "lost", "lost": where}
    return found | {"status": "finished", "lost": None}


def weights(run: Run, loss: float | None) -> Transformer | None:
    """The model that a run ended with; None where it went on regardless of bad steps until its weights are not finite.

    `loss`: the trainer's last one. Where that is finite, a checkpoint that is missing is an error: `UserError`.
    """
    try:
        checkpoint = find_checkpoint(run.directory)
    except UserError as error:
        regardless = run.config.nan_policy == "log" and loss is not None and not math.isfinite(loss)
        if error.exit_code == EXIT_CHECKPOINT and regardless:
            return None
        raise
    return load_model(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")


def quarters(run: Run) -> dict[str, float | None]:
    """The trainer's validation loss, on the tokens that rates are chosen by, after a quarter, half and all steps."""
    steps, values = run.series("val/loss")
    by_step = dict(zip(steps.tolist(), values.tolist(), strict=True))
    last = run.config.train.max_steps
    every = run.config.train.eval_every
    return {"25": by_step.get(every), "50": by_step.get(2 * every), "100": by_step.get(last)}


def too_high(found: dict[str, Any]) -> dict[str, Any] | None:
    """Why a run that came to its end is lost all the same."""
    loss, limit = found["val_loss"], found["unigram_entropy"]
    if math.isfinite(loss) and loss <= limit:
        return None
    return {"step": None, "why": f"final validation loss {loss:.4f} is not below the unigram entropy {limit:.4f}"}


def report_rows(corpus: Corpus, split: str, T: int, task: dict[str, Any]) -> np.ndarray:
    """Rows (N, T + 1) that tables report: of `val` those after the tokens that rates are chosen by; else the first."""
    tokens = corpus.tokens(split)
    rows = evaluation_rows(tokens, T, len(tokens), corpus.chunk_len)
    skipped = task["tuning_tokens"] // T if split == "val" else 0
    rows = rows[skipped : skipped + task["report_tokens"] // T]
    if not len(rows):
        raise SystemExit(f"{split} has {len(tokens)} tokens: none are left after the {skipped * T} that choose rates")
    return rows


def tuning_rows(corpus: Corpus, T: int, task: dict[str, Any]) -> np.ndarray:
    return evaluation_rows(corpus.tokens("val"), T, task["head_sequences"] * T, corpus.chunk_len)


def unigram_entropy(corpus: Corpus, rows: np.ndarray) -> float:
    """Loss over `rows`, in nats, of a model that knows only how frequent each token is in train (counts + 1)."""
    n_vocab = corpus.tokenizer.n_vocab
    counts = np.bincount(corpus.tokens("train"), minlength=n_vocab) + 1.0
    targets = rows[:, 1:]
    return float(-np.log(counts / counts.sum())[targets[targets >= 0]].mean())


def evaluate(
    model: Transformer, corpus: Corpus, rows: np.ndarray, other_rows: np.ndarray, T: int, task: dict[str, Any]
) -> dict[str, Any]:
    """In fp32 whatever the run was trained in: losses on the held-out splits, entropy, what heads are worth."""
    found: dict[str, Any] = {"evaluated_in": "fp32"}
    for split in [name for name in HELD_OUT if name in corpus.splits]:
        split_rows = rows if split == "val" else report_rows(corpus, split, T, task)
        measured = measure_split(model, split_rows, BATCH)
        nats = measured.loss
        found[f"{split}_loss"] = nats
        found[f"{split}_bits_per_byte"] = nats / math.log(2) / bytes_per_token(split_rows, corpus.tokenizer)
        found[f"{split}_tokens"] = measured.tokens
        if split == "val":
            found["entropy"] = np.round(measured.entropy.astype(np.float64), 4)
    if not task["tuning"] and math.isfinite(found["val_loss"]):
        began = time.monotonic()
        heads = cost_of_heads(model, rows[: task["head_sequences"]], other_rows, found["entropy"])
        heads["seconds"] = round(time.monotonic() - began, 1)
        found["heads"] = {k: np.round(v, 5) if isinstance(v, np.ndarray) else v for k, v in heads.items()}
    return found


def main(argv: list[str]) -> int:
    tasks = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    began: float | None = tasks["began"]  # of this process: its first cell pays for the imports
    for task in tasks["cells"]:
        record = perform(task, Path(tasks["runs"]), tasks["keep"], began)
        record["commit"] = tasks["commit"] or record["commit"]
        record["workers"] = tasks["workers"]
        began = None
        store.append(store.path_of(Path(tasks["out"]), tasks["scale"], task["rung"]), record)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the page says without a line of script: the table of runs, how each ended, and their settings."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normfree.config import Config, flat_keys
from normfree.heads import is_overloaded
from normfree.report.data import SOURCES, array, events, fault, seq_len
from normfree.runs import Run, is_lost, norm_label

NAMES = ("name", "run_dir")  # they differ between any two runs, and the page names the runs elsewhere
DASH = "\N{EN DASH}"


@dataclass
class Overview:
    """One line of the table of runs, in words, and what is told below it."""

    label: str
    status: str
    lost: bool
    last_step: str
    parameters: str
    last_loss: str
    best_loss: str
    perplexity: str
    overloaded: str
    nan_heads: str
    story: str  # how it ended, where that was not well
    warnings: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    about: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Setting:
    """A key of the configuration, what it does, and its value in each run."""

    key: str
    help: str
    weights: bool
    values: list[str]


def overview(run: Run, label: str) -> Overview:
    share, n_nan, n_head = head_words(run)
    status = str(run.status.get("status", "unknown"))
    return Overview(
        label=label,
        status="lost" if is_lost(run) and status == "finished" else status,
        lost=is_lost(run),
        last_step=_integer(run.status.get("last_step")),
        parameters=_integer((run.status.get("parameters") or {}).get("total")),
        last_loss=_last(run, "val/loss"),
        best_loss=_best(run, "val/loss"),
        perplexity=_last(run, "val/perplexity", 2),
        overloaded=share,
        nan_heads=f"{n_nan} of {n_head}" if n_head else DASH,
        story=story(run),
        warnings=[str(w) for w in run.status.get("warnings") or []],
        events=events(run),
        about=about(run),
    )


def head_words(run: Run) -> tuple[str, int, int]:
    """(share of overloaded heads in words, NaN heads, heads) of the last record, of the probe where there is one."""
    for name in ("probe_attn_entropy" if source == "probe" else "attn_entropy" for source in SOURCES):
        if run.has(name) and len(array(run, name)[0]):
            last = array(run, name)[1][-1]
            n_over = int(is_overloaded(last, seq_len(run)).sum())
            return f"{100 * n_over / last.size:.0f} %", int(np.isnan(last).sum()), last.size
    return DASH, 0, 0


def story(run: Run) -> str:
    """How a run ended that did not end well: the traced fault, the trainer's reason, or what the record shows."""
    found = fault(run)
    if found:
        where = f"{found.get('module', 'unknown module')}, {found.get('phase', 'unknown phase')}"
        return found.get("text") or f"The first non-finite value was at step {found['step']}: {where}."
    reason = run.status.get("reason")
    if reason:
        return str(reason)
    if is_lost(run):
        return "Training went on to its last step, but the loss at the end is not finite."
    return ""


def about(run: Run) -> list[tuple[str, str]]:
    """What run.json knows of where a run comes from, as far as it was written down."""
    status = run.status
    versions = status.get("versions") or {}
    corpus = status.get("corpus") or {}
    pairs = [
        ("directory", str(run.directory)),
        ("norms", status.get("norms") or norm_label(run.config)),
        ("sequence length T", str(seq_len(run))),
        ("device", status.get("device")),
        ("precision", status.get("precision")),
        ("compiled", None if status.get("compiled") is None else _value(status["compiled"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("tokenizer", corpus.get("tokenizer")),
        ("corpus", corpus.get("fingerprint")),
        ("command", status.get("command")),
        ("commit", status.get("commit")),
        ("postmortem", (status.get("fault") or {}).get("postmortem")),
        ("sample", status.get("sample")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def settings(runs: Sequence[Run]) -> tuple[list[Setting], list[Setting]]:
    """(settings that differ between the runs, those that are equal); those that change the weights come first."""
    words = _help()
    columns: dict[str, Setting] = {}
    for run in runs:
        for key, value, weights in flat_keys(run.config):
            setting = columns.setdefault(key, Setting(key, words.get(key, ""), weights or key == "seed", []))
            setting.values.append(_value(value))
    ordered = sorted(columns.values(), key=lambda s: not s.weights)
    differing = [s for s in ordered if len(set(s.values)) > 1 and s.key not in NAMES]
    return differing, [s for s in ordered if len(set(s.values)) == 1]


def _help(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """key -> what it does."""
    words: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            words |= _help(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            words[prefix + f.name] = f.metadata["help"]
    return words


def _value(value: Any) -> str:
    """A setting as it is typed: null, true, [a, b]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return str(value)


def _integer(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else DASH


def _last(run: Run, name: str, digits: int = 4) -> str:
    values = run.series(name)[1]
    return _number(float(values[-1]), digits) if len(values) else DASH


def _best(run: Run, name: str) -> str:
    """The lowest finite value and its step."""
    steps, values = run.series(name)
    if not np.isfinite(values).any():
        return DASH
    best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
    return f"{values[best]:.4f} at {steps[best]:,}"


def _number(value: float, digits: int) -> str:
    if math.isfinite(value):
        return f"{value:,.{digits}f}"
    return "NaN" if math.isnan(value) else ("Inf" if value > 0 else "-Inf")

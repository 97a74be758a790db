"""What is said when training ends."""

import math
import shlex

import numpy as np
from rich.table import Table as RichTable

from normfree import heads
from normfree.runs import Run, norm_label


def entropy_summary(run: Run) -> str:
    """Mean entropy, shares by quarter of the ceiling and overloaded heads of the last probe (else training) record."""
    names = [name for name in ("probe_attn_entropy", "attn_entropy") if run.has(name)]
    if not names:
        return "not recorded"
    entropy = run.array(names[0])[1][-1]
    T = run.config.data.seq_len or 1
    shares = heads.range_shares(entropy, T)
    finite = entropy[np.isfinite(entropy)]
    mean = f"mean {finite.mean():.2f} of {heads.entropy_ceiling(T):.2f} nats" if finite.size else "no finite head"
    quarters = " ".join(f"{100 * share:.0f}%" for share in shares.shares)
    overloaded = int(heads.is_overloaded(entropy, T).sum())
    nan = f", {shares.n_nan} NaN" if shares.n_nan else ""
    return f"{mean}; heads by quarter {quarters}; {overloaded} of {entropy.size} overloaded{nan}"


def training_loss(run: Run, last: float | None) -> str:
    """From the first logged loss to `last`, the last step's; None: to the last one logged, and of which step it is."""
    steps, losses = run.series("train/loss")
    if not len(losses):  # a run of which every step was left out has none
        return "not recorded"
    end = f"{losses[-1]:.3f} (at step {steps[-1]})" if last is None else f"{last:.3f}"
    return f"{losses[0]:.3f} -> {end} nats a token"


def _from_to(losses: np.ndarray) -> str:
    return f"{losses[0]:.3f} -> {losses[-1]:.3f} nats a token" if len(losses) else "not recorded"


def closing_table(run: Run, last_loss: float | None) -> RichTable:
    """What a user wants to know when training ends; `last_loss` is that of the last training step, where known."""
    status = run.status
    val, perplexity, bits = (run.series(name)[1] for name in ("val/loss", "val/perplexity", "val/bits_per_byte"))
    counts, speed = status["parameters"], status["tokens_per_second"]
    rows = {
        "model": f"{run.name}, {norm_label(run.config)}",
        "parameters": f"{counts['total']:,} ({counts['non_embedding']:,} without embeddings)",
        "training loss": training_loss(run, last_loss),
        "validation loss": _from_to(val),
        "perplexity": f"{perplexity[-1]:.2f}; {bits[-1]:.3f} bits a byte" if len(bits) else "not recorded",
        "speed": f"{speed:,.0f} tokens/s" if math.isfinite(speed) else "too few steps to tell",
        "attention entropy": entropy_summary(run),
        "NaN in block outputs": f"{int(run.nan_counts.sum()):,} elements" if run.has("nan_count") else "not recorded",
        "figures": ", ".join(sorted(p.name for p in (run.directory / "figures").glob("*"))) or "none",
    }
    table = RichTable(show_header=False, title="finished", title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def closing_lines(run: Run) -> list[str]:
    """Printed below the table, each on a line that is never cut or broken: what is there can be copied."""
    return [
        f"written to: {run.directory}",
        f"look through it: python -m normfree.report {shlex.quote(str(run.directory))}",
    ]

"""One table of finished runs: what each configuration reached, and how it differs from the baseline of the same seeds.

    python experiments/summarize.py RUNS... [--baseline NAME] [--out FILE]

A row is a configuration over its seeds. Losses are of the last step. Lost runs (diverged, failed, or without a finite
validation loss at the end) and unfinished ones are counted, never averaged; where there are some, the numbers are of
the others and say of how many. The paired difference takes the seeds that both configurations finished. Intervals are
95 % t intervals over seeds. Saves what it prints as FILE.csv and FILE.json.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normfree.errors import EXIT_DIRECTORY, EXIT_OK, UserError, say, unknown
from normfree.heads import range_shares
from normfree.records import write_atomically
from normfree.runs import Run, expand, is_lost, norm_label
from plotting.common import seq_len, sourced
from plotting.seeds import Group, differing_keys, final, group, mean_interval, trained

DASH = "-"
OVERLOADED_RANGE = 3  # the last of heads.RANGES


@dataclass
class Row:
    """One configuration. Entropies in nats, shares of heads in percent; None where there is nothing to say."""

    configuration: str
    norms: str
    keys: dict[str, Any]  # the settings in which the configurations of the table differ
    seeds: list[int]
    n: int
    lost: int
    unfinished: int
    losses: dict[int, float]  # seed -> validation loss, of the finished runs
    loss: float | None
    loss_interval: float | None  # half width
    perplexity: float | None  # exp of the mean loss
    pairs: int
    difference: float | None
    difference_interval: float | None
    mean_entropy: float | None
    overloaded: float | None


def summarize(runs: Sequence[Run], baseline: str | None = None) -> tuple[list[Row], str | None]:
    """The rows in order of first appearance, and the name of the baseline (None: there is none)."""
    groups = group(trained(runs))
    keys = differing_keys([g.runs[0] for g in groups])
    base = _baseline(groups, baseline)
    reference = _losses(base) if base else {}
    rows = [_row(g, {name: values[i] for name, values in keys.items()}, reference) for i, g in enumerate(groups)]
    return rows, base.label if base else None


def _baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    """The configuration of this name, or the first one; by default the first with norms in its blocks."""
    if name == "first":
        return groups[0]
    if name is not None:
        found = [g for g in groups if g.label == name]
        if not found:
            raise UserError(f"--baseline: {unknown('configuration', name, ['first', *(g.label for g in groups)])}")
        return found[0]
    normed = [g for g in groups if "none" not in (g.runs[0].config.model.norm, g.runs[0].config.model.placement)]
    return normed[0] if normed else None


def _finished(g: Group) -> list[Run]:
    return [run for run in g.runs if run.status.get("status") == "finished" and not is_lost(run)]


def _losses(g: Group) -> dict[int, float]:
    found = {run.config.seed: final(run, "val/loss") for run in _finished(g)}
    return {seed: loss for seed, loss in found.items() if math.isfinite(loss)}  # of an old run it may not be there


def _row(g: Group, keys: dict[str, Any], reference: dict[int, float]) -> Row:
    losses = _losses(g)
    loss, interval = _mean(list(losses.values()))
    paired = [losses[seed] - reference[seed] for seed in losses if seed in reference]
    difference, difference_interval = _mean(paired)
    levels = [found for run in _finished(g) if (found := _entropy(run)) is not None]
    return Row(
        configuration=g.label,
        norms=norm_label(g.runs[0].config),
        keys=keys,
        seeds=[run.config.seed for run in g.runs],
        n=len(g.runs),
        lost=g.lost,
        unfinished=len(g.runs) - g.lost - len(losses),
        losses=losses,
        loss=loss,
        loss_interval=interval,
        perplexity=None if loss is None or loss > 700 else math.exp(loss),  # beyond the range of a float
        pairs=len(paired),
        difference=difference,
        difference_interval=difference_interval,
        mean_entropy=_mean([mean for mean, _ in levels])[0],
        overloaded=_mean([share for _, share in levels])[0],
    )


def _mean(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and half width of its interval; None without samples, and no interval of a single one."""
    if not samples:
        return None, None
    mean, half = mean_interval(samples)
    return float(mean), float(half) if len(samples) > 1 else None


def _entropy(run: Run) -> tuple[float, float] | None:
    """Mean entropy over the heads that are not NaN, and percent of all heads overloaded, at the last record.

    None where nothing was recorded, every head is NaN, or sequences of one token leave no entropy to speak of.
    """
    if not {"attn_entropy", "probe_attn_entropy"} & set(run.array_names):
        return None
    heads = sourced(run, "attn_entropy", None)[2][-1]
    if np.isnan(heads).all() or seq_len(run) == 1:
        return None
    return float(np.nanmean(heads)), 100 * float(range_shares(heads, seq_len(run)).shares[OVERLOADED_RANGE])


# ------------------------------------------------------------------------------------------------------ the output


def cells(row: Row, is_baseline: bool) -> dict[str, str]:
    """What the table shows, column by column."""
    return {
        "configuration": row.configuration + (" *" if is_baseline else ""),
        **{name: str(value) for name, value in row.keys.items()},
        "val loss": _number(row.loss, row.loss_interval) + _of(row),
        "perplexity": _number(row.perplexity, digits=3),
        "difference": DASH if is_baseline else _paired(row),
        "lost": f"{row.lost} of {row.n}",
        "unfinished": str(row.unfinished) if row.unfinished else DASH,
        "mean entropy": _number(row.mean_entropy, digits=3),
        "overloaded %": _number(row.overloaded, digits=1),
        "norms": row.norms,
    }


def _number(value: float | None, half: float | None = None, digits: int = 4, sign: str = "") -> str:
    if value is None:
        return DASH
    return f"{value:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def _of(row: Row) -> str:
    return f" ({len(row.losses)} of {row.n})" if 0 < len(row.losses) < row.n else ""


def _paired(row: Row, digits: int = 4) -> str:
    if row.difference is None:
        return DASH
    pairs = f" ({row.pairs} pair{'s' * (row.pairs != 1)})"
    return _number(row.difference, row.difference_interval, digits, "+") + pairs


def show(rows: Sequence[Row], baseline: str | None) -> None:
    """One table where there is room; else the configurations as a list, and a table of their numbers."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=1000)
    lines = [cells(row, row.configuration == baseline) for row in rows]
    table = _table(lines)
    lead: list[str] = []
    if table.__rich_measure__(console, console.options).maximum > console.width:
        lead = [f"{i}  {line['configuration']}; {line['norms']}" for i, line in enumerate(lines, 1)]
        table = _table([narrow(i, row, row.configuration == baseline) for i, row in enumerate(rows, 1)], padding=1)
    note = f"* baseline of the paired differences: {baseline}" if baseline else "no baseline: name one by --baseline"
    for text in (*lead, table, f"{note}. Validation loss in nats per token; entropy in nats."):
        console.print(text, markup=False, highlight=False)


def _table(lines: Sequence[dict[str, str]], padding: int = 2) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, padding, 0, 0), header_style="bold")
    for name in lines[0]:
        table.add_column(name, justify="left" if name in ("configuration", "norms") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line.values())
    return table


def narrow(i: int, row: Row, is_baseline: bool) -> dict[str, str]:
    """The i-th row for a terminal of 80 columns: what is compared, to three digits."""
    return {
        "": f"{i}" + ("*" if is_baseline else ""),
        "val loss": _number(row.loss, row.loss_interval, 3),
        "difference": DASH if is_baseline else _paired(row, 3),
        "lost": f"{row.lost} of {row.n}",
        "going": str(row.unfinished or DASH),
        "entropy": _number(row.mean_entropy, digits=2),
        "overl. %": _number(row.overloaded, digits=0),
    }


def save(rows: Sequence[Row], baseline: str | None, out: Path) -> list[Path]:
    """FILE.csv, one line a configuration, and FILE.json, with the loss of every seed too."""
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; name a file in it: {out / 'summary'}.", EXIT_DIRECTORY)
    paths = [out.with_name(out.name.removesuffix(".csv").removesuffix(".json") + end) for end in (".csv", ".json")]
    flat = [{**asdict(row), "baseline": row.configuration == baseline} for row in rows]
    for line in flat:
        line |= line.pop("keys")
        line["seeds"] = " ".join(map(str, line["seeds"]))
        line["losses"] = " ".join(map(repr, line["losses"].values()))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with paths[0].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(flat[0]))
            writer.writeheader()
            writer.writerows(flat)
        content = {"baseline": baseline, "rows": [asdict(row) for row in rows]}
        write_atomically(paths[1], json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", EXIT_DIRECTORY) from error
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, a glob, or a folder of runs")
    parser.add_argument("--baseline", metavar="NAME", help="a configuration of the table, or: first")
    parser.add_argument("--out", type=Path, default=Path("summary"), metavar="FILE", help="default: summary")
    arguments = parser.parse_args(argv)
    try:
        rows, baseline = summarize(expand(arguments.runs), arguments.baseline)
        show(rows, baseline)
        paths = save(rows, baseline, arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    say("\n".join(map(str, paths)))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

"""The run directory: written by the trainer, read by everything else. Imports no torch.

    config.yaml            every setting, resolved
    run.json               status, last step, reason, versions, device
    metrics.jsonl          scalars: one strict JSON object a record, key `step`
    arrays/<name>.bin      fixed-size records: int64 step, then the values
    arrays/<name>.json     their shape, dtype, axes and unit
    tensorboard/           a view
    checkpoints/step-00000100/
    figures/

Both kinds of record are appended and survive a kill: a torn last record is left out by the reader and cut off by the
next writer.
"""

import json
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from normfree.config import Config, flat_keys, from_dict
from normfree.errors import EXIT_DIRECTORY, UserError
from normfree.records import ArrayInfo, number, read_info, read_lines, read_records

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "MANIFEST.json"  # what a checkpoint directory has and a run directory has not
# Where NaN and Inf are counted: outputs of block, attention and feed-forward, attention probabilities; queries, keys,
# values; the feed-forward's hidden layer, after its activation. New ones go last: older records have the first of them.
SITES = ("block", "attn", "mlp", "attn_probs", "q", "k", "v", "mlp_hidden")
IN_ORDER = ("q", "k", "v", "attn_probs", "attn", "mlp_hidden", "mlp", "block")  # in which a block computes them
LOST = ("diverged", "failed")  # statuses
EVALUATION = "evaluation"  # a status' `kind`: the directory is of normfree.evaluate, and nothing was trained there
TIMES = ("seconds", "tokens_per_second")  # the only scalars that two runs of the same bits may differ in


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def norm_label(config: Config) -> str:
    """What summaries and figures say about the norms, so that nobody has to guess what norm-free means."""
    model = config.model
    blocks = "no block norms" if "none" in (model.norm, model.placement) else f"{model.norm} in the blocks"
    return f"{blocks}, " + ("no final norm" if model.final_norm == "none" else "final norm kept")


class Run:
    """One run directory, read lazily.

    `entropy` and `nan_counts` are of the training batches; `probe_entropy` is of the fixed validation probe in eval
    mode, comparable over steps and runs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, {self.status.get('status', 'unknown')})"

    @cached_property
    def config(self) -> Config:
        path = self.directory / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return from_dict(values)
        except (OSError, ValueError, RecursionError, yaml.YAMLError, UserError) as error:
            raise UserError(f"{path} cannot be read: {error}", EXIT_DIRECTORY) from error

    @property
    def name(self) -> str:
        return self.config.name or self.directory.name

    @cached_property
    def status(self) -> dict[str, Any]:
        path = self.directory / "run.json"
        if not path.exists():
            return {}
        try:
            return {k: number(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}", EXIT_DIRECTORY) from error

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        lines = read_lines(path) if path.exists() else []
        return [{name: number(value) for name, value in row.items()} for row in lines]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one scalar where it was recorded; a NaN among the values was recorded as NaN."""
        found = [(row["step"], row[name]) for row in self._rows if name in row]
        return np.array([step for step, _ in found], dtype=np.int64), np.array([v for _, v in found], dtype=np.float64)

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """Scalars, one row a step (values recorded at the same step are merged), ordered by step.

        NaN stands both for a value that was NaN and for one that was not recorded at that step; `series` tells them
        apart.
        """
        import pandas as pd

        merged: dict[int, dict[str, Any]] = {}
        for row in self._rows:
            merged.setdefault(row["step"], {}).update(row)
        return pd.DataFrame([merged[step] for step in sorted(merged)], columns=None if merged else ["step"])

    @cached_property
    def array_names(self) -> list[str]:
        return sorted(path.stem for path in (self.directory / "arrays").glob("*.bin"))

    def has(self, name: str) -> bool:
        return name in self.array_names

    def info(self, name: str) -> ArrayInfo:
        return read_info(self.directory / "arrays" / f"{name}.bin")

    def array(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a recorded array: int64 (records,), and (records, *shape)."""
        if name not in self.array_names:
            raise UserError(f"{self.directory} has no array {name!r}; it has: {', '.join(self.array_names) or 'none'}.")
        records = read_records(self.directory / "arrays" / f"{name}.bin")
        return records["step"].astype(np.int64), np.ascontiguousarray(records["value"])

    @property
    def entropy(self) -> np.ndarray:
        """Attention entropy of the training batch: float32 (records, n_layer, n_head), nats, NaN where it was NaN."""
        return self.array("attn_entropy")[1]

    @property
    def entropy_steps(self) -> np.ndarray:
        return self.array("attn_entropy")[0]

    @property
    def probe_entropy(self) -> np.ndarray:
        return self.array("probe_attn_entropy")[1]

    @property
    def probe_entropy_steps(self) -> np.ndarray:
        return self.array("probe_attn_entropy")[0]

    @property
    def nan_counts(self) -> np.ndarray:
        """NaN elements in each block's output over a whole optimizer step: int64 (records, n_layer)."""
        return self.counts["block"]

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """NaN elements by site: int64 (records, n_layer). `attn_probs` is over all heads (the original: / n_head)."""
        values = self.array("nan_count")[1]
        return {site: values[:, i] for i, site in enumerate(SITES[: values.shape[1]])}

    @cached_property
    def inf_counts(self) -> dict[str, np.ndarray]:
        """Infinite elements by site; attention probabilities are never infinite."""
        values = self.array("inf_count")[1]
        return {site: values[:, i] for i, site in enumerate(SITES[: values.shape[1]])}

    @cached_property
    def elements(self) -> dict[str, np.ndarray]:
        """How many elements were looked at, by site: int64 (records,), the denominators of `counts`."""
        values = self.array("elements")[1]
        return {site: values[:, i] for i, site in enumerate(SITES[: values.shape[1]])}

    @property
    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory), oldest first."""
        found = (self.directory / "checkpoints").glob("step-*")
        numbered = (path for path in found if path.name.removeprefix("step-").isdecimal() and path.is_dir())
        return sorted((int(path.name.removeprefix("step-")), path) for path in numbered)

    def to_npz(self, path: str | Path) -> None:
        """All arrays in one .npz: `<name>` and `<name>_steps`."""
        arrays: dict[str, np.ndarray] = {}
        for name in self.array_names:
            arrays[f"{name}_steps"], arrays[name] = self.array(name)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    def to_csv(self, path: str | Path) -> None:
        """The scalars as CSV."""
        self.metrics.to_csv(path, index=False)


def is_evaluation(run: Run) -> bool:
    """Whether the directory is what `normfree.evaluate` wrote."""
    return run.status.get("kind") == EVALUATION


def is_lost(run: Run) -> bool:
    """Diverged, failed, or finished on a loss that is not finite (`nan_policy=log` trains on): the last one of
    validation, or of training where nothing was evaluated.
    """
    status = run.status.get("status")
    if status in LOST:
        return True
    values = next((v for v in (run.series(name)[1] for name in ("val/loss", "train/loss")) if len(v)), None)
    return status == "finished" and values is not None and not math.isfinite(values[-1])


def lost_at(run: Run) -> int | None:
    """The step at which a lost run was lost; None where nothing says it (a failed run, say).

    A run that diverged knows its step. One that trained on was lost at the first record since which no training loss
    was finite.
    """
    if run.status.get("status") in LOST:
        step = run.status.get("last_step")
        return step if isinstance(step, int) else None
    steps, values = run.series("train/loss")
    finite = np.flatnonzero(np.isfinite(values))
    after = steps[finite[-1] + 1 :] if len(finite) else steps
    return int(after[0]) if len(after) else None


def is_run(directory: str | Path) -> bool:
    """Whether this is a run directory; a checkpoint, which holds a copy of its configuration, is none."""
    return (Path(directory) / "config.yaml").is_file() and not is_checkpoint(directory)


def is_checkpoint(directory: str | Path) -> bool:
    return (Path(directory) / MANIFEST).is_file()


def load_run(directory: str | Path) -> Run:
    """Open a run directory for reading."""
    directory = Path(directory)
    if is_checkpoint(directory):
        raise UserError(
            f"{directory} is a checkpoint; name the run it belongs to: {directory.parent.parent}.", EXIT_DIRECTORY
        )
    if not is_run(directory):
        raise UserError(
            f"{directory} is no run directory: {_why_not(directory)}. A run is what `python run.py` wrote, by default "
            "under runs/.",
            EXIT_DIRECTORY,
        )
    return Run(directory)


def _why_not(directory: Path) -> str:
    if directory.is_dir():
        return "it has no config.yaml, and holds no directory that has one"
    if directory.exists():
        return "it is a file"
    if has_magic(str(directory)):
        return "nothing matches it"
    beside = [path.name for path in directory.parent.iterdir()] if directory.parent.is_dir() else []
    near = get_close_matches(directory.name, beside, n=1)
    return "it does not exist" + (f"; near it is {directory.parent / near[0]}" if near else "")


def expand(patterns: Iterable[str | Path]) -> list[Run]:
    """Runs of directories and globs, in the order given; a folder that holds runs stands for all of them."""
    runs: list[Run] = []
    for pattern in patterns:
        found = sorted(glob(str(pattern))) or [str(pattern)]
        for name in found:
            inner = sorted(p.parent for p in Path(name).glob("*/config.yaml")) if not is_run(name) else []
            runs += [load_run(path) for path in inner or [Path(name)]]
    return runs


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart: the name, with the seed or else the directory where names repeat."""
    options = (
        [run.name for run in runs],
        [f"{run.name} s{run.config.seed}" for run in runs],
        [run.directory.name for run in runs],
        [str(run.directory) for run in runs],
    )
    return next((names for names in options if len(set(names)) == len(runs)), options[-1])


def load_runs(pattern: str | Path | Iterable[str | Path]) -> "pd.DataFrame":
    """One tidy frame of several runs: every metrics row, with `run`, `directory`, `status`, `kind` (run or evaluation)
    and the configuration.
    """
    import pandas as pd

    frames = []
    for run in expand([pattern] if isinstance(pattern, str | Path) else pattern):
        columns = {"run": run.name, "directory": str(run.directory), "status": run.status.get("status")}
        columns["kind"] = EVALUATION if is_evaluation(run) else "run"
        columns |= {name: str(v) if isinstance(v, list) else v for name, v, _ in flat_keys(run.config)}
        frames.append(run.metrics.assign(**columns))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

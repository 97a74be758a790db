"""What is kept of a step that met a value that is not finite: enough to say what happened, and to run it again.

    postmortem/step-00000123/
        README.txt      what happened, in words, and what to try
        finding.json    the same for programs: `finding` (null: not found again) and `circumstances`
        ring.npz        the last steps' numbers, whatever the trainer held of them
        batch.npz       rows int32 (B, T + 1) of the whole optimizer step, indices (B,) of them, micro_batch_size
        config.yaml     every setting
        checkpoint/     weights, moments and loss scale before the step

It needs neither the corpus nor the run: `python -m normfree.diagnostics.replay postmortem/step-00000123`.
"""

import json
import math
import os
import shlex
import shutil
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from normfree.config import Config, from_dict, to_dict
from normfree.diagnostics.finding import Finding
from normfree.diagnostics.hooks import LEVELS
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.records import number, strict
from normfree.runs import checkpoint_name
from normfree.training import checkpoint as ckpt

ROWS = 10  # of the ring, in README.txt
NOT_SHOWN = ("step", "first_bad", "bad_steps", "bad_in_a_row", "batch", "level")  # in the table; ring.npz has them
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError)
COLUMNS = 10
_NUMBERS = ("loss", "grad_norm", "learning_rate")  # of the circumstances: not always finite
COMMAND = "python -m normfree.diagnostics.replay"
POLICIES = {  # those that do not stop
    "skip": "leaves such steps out",
    "rollback": "goes back to the last good checkpoint, at a lower rate",
    "log": "goes on regardless",
}


@dataclass(frozen=True)
class Circumstances:
    """The step as the trainer saw it, and what it ran on. `plugins`: path and sha256 of each."""

    loss: float
    grad_norm: float
    learning_rate: float
    device: str  # cpu or cuda
    compiled: bool
    reason: str = ""  # the trainer's own sentence
    plugins: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Postmortem:
    """An opened postmortem directory. `rows`: int64 (B, T + 1)."""

    directory: Path
    step: int
    config: Config
    rows: np.ndarray
    indices: np.ndarray
    finding: Finding | None
    circumstances: Circumstances

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"


def write_postmortem(
    run_dir: Path,
    step: int,
    config: Config,
    *,
    checkpoint: Path,
    rows: np.ndarray,
    indices: np.ndarray,
    finding: Finding | None,
    circumstances: Circumstances,
    ring: dict[str, np.ndarray],
) -> Path:
    """Write `postmortem/step-<step>` beside and rename it; an older one of that step gives way. Returns its path.

    `checkpoint` is the state before the step; its files are linked, or copied where links cannot be. Raises OSError
    (a full disk), and UserError where the checkpoint is damaged; either leaves nothing behind.
    """
    target = run_dir / "postmortem" / checkpoint_name(step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        np.savez_compressed(temporary / "ring.npz", **ring)  # type: ignore[arg-type]
        micro = np.int64(config.train.micro_batch_size or config.train.batch_size)
        np.savez_compressed(
            temporary / "batch.npz", rows=rows.astype(np.int32), indices=indices, micro_batch_size=micro
        )
        (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
        _link(checkpoint, temporary / "checkpoint")
        told = {
            "step": step,
            "finding": None if finding is None else finding.to_dict(),
            "circumstances": {name: strict(value) for name, value in asdict(circumstances).items()},
        }
        (temporary / "finding.json").write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        words = _words(target, step, config, finding, circumstances, ring)
        (temporary / "README.txt").write_text(words, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _link(checkpoint: Path, copy: Path) -> None:
    copy.mkdir()
    for source in checkpoint.iterdir():
        try:
            os.link(source, copy / source.name)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(source, copy / source.name)
    ckpt.verify(copy)


def find_postmortem(path: str | Path) -> Path:
    """The postmortem directory that `path` names: itself, or the newest of a run directory."""
    path = Path(path)
    if (path / "finding.json").is_file():
        return path
    found = sorted(p.parent for p in (path / "postmortem").glob("step-*/finding.json"))
    if not found:
        raise UserError(
            f"{path} is neither a postmortem directory nor a run that has one. A run that met a value that is not "
            "finite, under nan_policy=raise, has RUN/postmortem/step-<step>.",
            EXIT_CHECKPOINT,
        )
    return found[-1]


def load_postmortem(path: str | Path) -> Postmortem:
    """Open a postmortem, its checkpoint verified; raises UserError where a file is missing or damaged."""
    directory = find_postmortem(path)
    try:
        told = json.loads((directory / "finding.json").read_text(encoding="utf-8"))
        config = from_dict(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")))
        with np.load(directory / "batch.npz") as batch:
            rows, indices = batch["rows"].astype(np.int64), batch["indices"]
        finding = None if told["finding"] is None else Finding.from_dict(told["finding"])
        values = {name: number(v) if name in _NUMBERS else v for name, v in told["circumstances"].items()}
        circumstances = Circumstances(**values)
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise UserError(f"postmortem {directory} cannot be read: {error}", EXIT_CHECKPOINT) from error
    ckpt.verify(directory / "checkpoint")
    return Postmortem(directory, told["step"], config, rows, indices, finding, circumstances)


# -- in words ---------------------------------------------------------------------------------------------------------


def _words(
    target: Path,
    step: int,
    config: Config,
    finding: Finding | None,
    seen: Circumstances,
    ring: dict[str, np.ndarray],
) -> str:
    where = (
        f"No module is known to be at fault. {seen.reason}"
        if finding is None
        else f"First of all, in the order of execution: {finding.words()}"
    )
    bad = finding is not None or not (math.isfinite(seen.loss) and math.isfinite(seen.grad_norm))
    parts = [
        f"Step {step} met a value that is not finite."
        if bad
        else f"Step {step} was bad, with a finite loss and gradient.",
        where,
        f"The training loss was {seen.loss:g}, the gradient norm {seen.grad_norm:g}, the learning rate "
        f"{seen.learning_rate:.4g} (peak {config.optim.lr:g}); {seen.device}, {config.train.precision}, "
        f"{'compiled' if seen.compiled else 'not compiled'}. checkpoint/ holds weights and moments as they were before "
        "that step.",
    ]
    table = ring_table(ring)
    if table:
        parts.append(f"The last steps (ring.npz has them all):\n\n{table}")
    parts.append(what_next(config, step, finding, target))
    return "\n\n".join(parts) + "\n"


def what_next(config: Config, step: int, finding: Finding | None, directory: Path | None) -> str:
    """What to try, and how to run the step again where it was kept: in README.txt and on the terminal."""
    lines = "\n".join(f"- {line}" for line in advice(config, step, finding))
    again = "" if directory is None else f"\n\n{how_to_replay(directory)}"
    return f"What to try\n\n{lines}{again}"


def how_to_replay(directory: Path) -> str:
    return (
        "Run the step again, in its own precision and in float64, to see what kind of fault it was:\n\n"
        f"    {COMMAND} {shlex.quote(str(directory))}"
    )


def advice(config: Config, step: int, finding: Finding | None) -> list[str]:
    """What may help against a bad step, one line each."""
    if config.debug.inject.step == step:
        return ["nothing: the fault was planted by debug.inject"]
    lines = [
        f"a lower optim.lr (now {config.optim.lr:g}), or a longer optim.warmup_steps (now {config.optim.warmup_steps})"
    ]
    if finding is not None and finding.phase == "forward" and config.train.precision == "fp16":
        lines.append("train.precision=bf16 or fp32: activations beyond 65504 do not fit fp16")
    if finding is not None and finding.phase == "optimizer":
        lines.append("an earlier checkpoint of the run: init_from=RUN/checkpoints/step-...")
    if config.model.norm == "none":
        lines.append("act=relu in place of a smooth activation, or norm=layernorm to see whether norms hold it")
    others = [f"nan_policy={name} {does}" for name, does in POLICIES.items() if name != config.nan_policy]
    return [*lines, "; ".join(others)]


def ring_table(ring: dict[str, np.ndarray], rows: int = ROWS) -> str:
    """The last `rows` of the ring as text; of an array over layers or heads, its largest value. Needs `step`."""
    steps = ring.get("step")
    if steps is None or not len(steps):
        return ""
    columns: dict[str, list[str]] = {"step": [str(int(s)) for s in steps[-rows:]]}
    residual_only = ring.get("level", np.zeros(len(steps)))[-rows:] == LEVELS.index("residual")
    for name, values in ring.items():
        if name in NOT_SHOWN or len(columns) > COLUMNS or values.ndim == 0 or len(values) != len(steps):
            continue
        last = values[-rows:].reshape(len(columns["step"]), -1)
        if last.shape[1]:
            title = name if values.ndim == 1 else f"max {name}"
            shown = [f"{v:.4g}" for v in last.max(axis=1)]  # a NaN among them shows
            if values.ndim > 1:  # what was not measured is no NaN
                absent = residual_only & np.isnan(last.astype(float)).all(axis=1)
                shown = ["-" if gone else cell for gone, cell in zip(absent, shown, strict=True)]
            columns[title] = shown
    widths = {name: max(len(name), *map(len, column)) for name, column in columns.items()}
    lines = ["  ".join(name.rjust(widths[name]) for name in columns)]
    for cells in zip(*columns.values(), strict=True):
        lines.append("  ".join(cell.rjust(widths[name]) for name, cell in zip(columns, cells, strict=True)))
    return "\n".join(lines)


def fault_entry(finding: Finding | None, step: int, directory: Path | None, run_dir: Path) -> dict[str, Any]:
    """What `run.json` says of it under `fault`; null where the traced step did not meet it again."""
    found: dict[str, Any] = {"phase": None, "module": None, "tensor": None, "value": None, "text": "not found again"}
    if finding is not None:
        found = {name: finding.to_dict()[name] for name in found}
    place = None if directory is None else directory.relative_to(run_dir).as_posix()
    return {"step": step, **found, "reproduced": finding is not None, "postmortem": place}

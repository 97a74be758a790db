"""Where a run begins: its directory, and whether that holds nothing, this run ended or half done, or another one."""

import math
from dataclasses import dataclass
from pathlib import Path

from normfree.config import Config
from normfree.errors import EXIT_CHECKPOINT, EXIT_DIRECTORY, EXIT_DIVERGED, EXIT_OK, UserError
from normfree.identity import weights_differences, weights_hash
from normfree.runs import checkpoint_name, is_evaluation, is_run, load_run
from normfree.training import checkpoint as ckpt
from normfree.training.locking import LOCK


@dataclass(frozen=True)
class RunResult:
    """How a run ended (finished, diverged, preempted), its exit code, last validation loss and directory."""

    status: str
    exit_code: int
    metric: float
    run_dir: Path


def default_run_dir(config: Config) -> Path:
    return Path("runs") / f"{config.name}-{weights_hash(config)}-s{config.seed}"


def differences(config: Config, run_dir: Path) -> list[str]:
    """What keeps `config` from being the run in `run_dir`, its length aside."""
    found = weights_differences(config, load_run(run_dir).config)
    return [d for d in found if not d.startswith("train.max_steps:")]


def plugin_hashes(plugins: list[dict[str, str]]) -> set[str]:
    return {plugin["sha256"] for plugin in plugins}


def ended(config: Config, run_dir: Path, plugins: list[dict[str, str]]) -> RunResult | None:
    """What an earlier, ended run of this configuration came to; None where there is something left to train."""
    if not is_run(run_dir) or is_evaluation(load_run(run_dir)) or differences(config, run_dir):
        return None
    status = load_run(run_dir).status
    if plugin_hashes(status.get("plugins", [])) != plugin_hashes(plugins):
        return None
    last = status.get("last_step", 0)
    if status.get("status") == "finished" and last >= config.train.max_steps and not _damaged(run_dir, last):
        return RunResult("finished", EXIT_OK, status.get("val/loss", math.nan), run_dir)
    if status.get("status") == "diverged":
        return RunResult("diverged", EXIT_DIVERGED, math.nan, run_dir)
    return None


def _precedes_a_run(path: Path) -> bool:
    """Whether it is what a process leaves that died before it had written config.yaml."""
    if path.name == "arrays":
        return path.is_dir() and not any(path.iterdir())
    return path.name == LOCK or path.name.startswith(".config.yaml.")


def _damaged(run_dir: Path, step: int) -> bool:
    """Whether checkpoint `step` is there and not whole; one that a user removed is not missed."""
    path = run_dir / "checkpoints" / checkpoint_name(step)
    if not path.exists():
        return False
    try:
        ckpt.verify(path)
    except UserError:
        return True
    return False


def starting_point(config: Config, run_dir: Path, plugins: list[dict[str, str]]) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start. Refuses a directory that is another run's."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir} is a file.", EXIT_DIRECTORY)
    if not run_dir.exists() or all(_precedes_a_run(path) for path in run_dir.iterdir()):
        return None
    if not is_run(run_dir):
        raise UserError(f"run_dir={run_dir} holds other files and is no run. Choose an empty one.", EXIT_DIRECTORY)
    run = load_run(run_dir)
    if is_evaluation(run):
        raise UserError(f"run_dir={run_dir} is an evaluation, and no run. Choose another one.", EXIT_DIRECTORY)
    # Asked for by name, a run may be made longer; a new command means exactly what it says.
    found = differences(config, run_dir) if config.resume else weights_differences(config, run.config)
    used = run.status.get("plugins", [])
    if plugin_hashes(used) != plugin_hashes(plugins):
        names = ", ".join(p["path"] for p in used) or "none"
        found.append(f"plug-ins: other files, or other contents, than that run's ({names})")
    if found:
        raise UserError(
            f"run_dir={run_dir} is a run of another configuration; two runs are never mixed. Choose another run_dir "
            "(null names one by itself). Here, not there:\n  " + "\n  ".join(found),
            EXIT_DIRECTORY,
        )
    good = ckpt.newest_good(run_dir, finite=config.nan_policy != "log")
    if good is None and run.checkpoints:
        raise UserError(
            f"run_dir={run_dir}: none of its {len(run.checkpoints)} checkpoints is whole and finite, so the run cannot "
            "go on, and starting again would overwrite its record. Move it away, or choose another run_dir.",
            EXIT_CHECKPOINT,
        )
    if good is None and config.resume and run.status.get("status") == "finished":
        raise UserError(
            f"resume={run_dir}: the run is finished and has no checkpoint any more, so there is nothing to go on from, "
            "and starting again would overwrite its record. Start a new run.",
            EXIT_CHECKPOINT,
        )
    return None if good is None else good[1]

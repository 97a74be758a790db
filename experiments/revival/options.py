"""What is typed after relu_revival.py, checked before anything is written or trained. Faults are `UserError`s."""

import argparse
import math
import os
import tempfile
from pathlib import Path

from normfree.errors import EXIT_DIRECTORY, UserError
from revival import records as store
from revival.cells import SEEDS, TUNING_SEED
from revival.rungs import LADDER

DOCS = Path(__file__).parents[2] / "docs"
SMOKE = Path("runs", ".relu_revival")  # nothing follows from it: it is not kept with the study's results


def check(a: argparse.Namespace, typed: set[str]) -> None:
    """`typed`: names of the options that were."""
    _pairs(a, typed)
    for name, value in (("--budget-minutes", a.budget_minutes), ("--together", a.together)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} {value:g} must be more than 0.")
    seeds(a)
    if a.merge:
        has_results(a.merge, "--merge")
    for folder in a.known:
        if folder.resolve() != store.RESULTS or folder.exists():
            has_results(folder, "--known", may_be_empty=True)
    if a.report and a.out and not a.merge:
        has_results(a.out, "--out")


def _pairs(a: argparse.Namespace, typed: set[str]) -> None:
    """What does not go together."""
    modes = [mode for mode in ("merge", "report") if mode in typed]
    if modes:
        beside = sorted(f"--{name.replace('_', '-')}" for name in typed - {"merge", "report", "out", "docs"})
        if beside:
            raise UserError(
                f"--{modes[0]} trains nothing: {', '.join(beside)} does not go with it. --merge, --report, --out and "
                "--docs go together."
            )
    if a.docs and not a.report:
        raise UserError("--docs is where --report writes the page, and there is no --report.")
    if a.corpus and a.scale == "smoke":
        raise UserError("--corpus is the text of --scale short or full; smoke, the default, has its own.")
    if a.scale == "short" and a.corpus is None and not (a.dry_run or modes):
        raise UserError("--scale short needs --corpus DIR: the folder that python experiments/revival_corpus.py made.")


def has_results(folder: Path, option: str, may_be_empty: bool = False) -> None:
    """Raise `UserError` unless `folder` holds results as the study writes them."""
    if any(path for scale in LADDER for path in folder.glob(f"{scale}/*.jsonl")):
        return
    wrong = "is no folder" if not folder.is_dir() else "is empty" if not any(folder.iterdir()) else None
    if wrong == "is empty" and may_be_empty:
        return
    raise UserError(
        f"{option} {folder} {wrong or 'holds no results'}. Expected is what --out DIR wrote: "
        f"DIR/{'|'.join(LADDER)}/RUNG.jsonl."
    )


def seeds(a: argparse.Namespace) -> tuple[int, ...]:
    """The seeds of a reported number."""
    n = a.seeds if a.seeds is not None else (1 if a.scale == "smoke" else len(SEEDS))
    if not 1 <= n < TUNING_SEED:
        raise UserError(f"--seeds {n} must be 1 to {TUNING_SEED - 1}: seed {TUNING_SEED} chooses rates.")
    return tuple(range(1, n + 1))


def out(a: argparse.Namespace) -> Path:
    """Where results are kept."""
    training = not (a.merge or a.report)
    return a.out or (SMOKE if training and a.scale == "smoke" else store.RESULTS)


def docs(a: argparse.Namespace) -> Path:
    """Where the page is written: that of the study's own results is the one in docs/."""
    return a.docs or (DOCS if out(a).resolve() == store.RESULTS else out(a) / "docs")


def writable(folder: Path, option: str) -> Path:
    """Make a folder, and try it: results are first written after minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written ({error}).", EXIT_DIRECTORY) from None
    return folder


# -- GPUs --------------------------------------------------------------------------------------------------------------


def gpus(text: str, scale: str) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES of each worker, of `--gpus text`; none: the CPU."""
    if text == "none":
        return ()
    visible = visible_gpus()
    names = visible if text == "auto" else tuple(name.strip() for name in text.split(","))
    if wrong := [name for name in dict.fromkeys(names) if name not in visible]:
        there = f"visible are {', '.join(visible)}" if visible else "no GPU is visible"
        raise UserError(f"--gpus {text}: there is no GPU {', '.join(map(repr, wrong))}; {there}. none is the CPU.")
    if not names and scale != "smoke":
        raise UserError(f"--scale {scale} is for a GPU, and none is visible; --gpus none trains on the CPU, for weeks.")
    return names


def visible_gpus() -> tuple[str, ...]:
    """One CUDA_VISIBLE_DEVICES for each GPU that this process may use; they are counted, not touched."""
    import torch

    n = torch.cuda.device_count()  # of those that the variable names, up to the first that is not there
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(map(str, range(n))) if named is None else tuple(part.strip() for part in named.split(","))[:n]

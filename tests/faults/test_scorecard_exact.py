"""The same run is the same bytes: twice, whatever surrounds the process, and resumed from whatever point it died at."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from crashes import record, same

from normfree import cli
from normfree.cli import run_config
from normfree.data.batches import Batches
from normfree.runs import load_run
from normfree.training import session
from normfree.training.loop import Trainer
from normfree.training.record import Record
from normfree.training.step import seed_dropout

# -- any point --------------------------------------------------------------------------------------------------------

STEPS, EPOCH = 8, 3  # of the run; steps an epoch
DROPOUT = {f"model.dropout.{where}": 0.1 for where in ("embed", "attn", "resid")}
PYTHIA = {
    "model.positions": "rotary",
    "model.rotary_pct": 0.5,
    "model.parallel_residual": True,
    "model.tie_embeddings": False,
}
SHAPE = {"model.n_layer": 2, "model.n_embd": 8, "train.batch_size": 8, "train.max_steps": STEPS}
SHAPE |= {"diagnostics.statistics": ["attn_entropy", "grad_norm", "update_norm", "position_entropy"]}
SHAPE |= {
    "diagnostics.snapshot_every": 4,
    "train.eval_every": 4,
    "train.keep_checkpoints": 99,
    "optim.schedule": "cosine",
    "log.every": 1,
}
MODELS = {
    "gpt2": {"model.norm": "layernorm", "train.micro_batch_size": 8},
    "gpt2, no norm": {"model.norm": "none", "train.micro_batch_size": 2},
    "pythia": {"model.norm": "layernorm", "train.micro_batch_size": 2} | PYTHIA,
    "pythia, no norm": {"model.norm": "none", "train.micro_batch_size": 8} | PYTHIA,
}
CALLS: list[tuple[type, str]] = [(Trainer, "save"), (Trainer, "evaluate"), (Trainer, "train_step"), (Record, "take")]
# Of the points before and after each call, those that differ in kind; the soak test takes every one.
FEW = ["save 0 before", f"train_step {EPOCH - 1} after", "evaluate 1 after", "take 4 before"]
SOME = [*FEW, "save 0 after", "evaluate 1 before", "take 4 after"]
SOME += [
    f"train_step {EPOCH - 1} before",
    f"train_step {EPOCH} after",
]  # the last batch of an epoch, the first of the next
SOME += ["evaluate 0 before", "save 3 after", "take 8 after"]  # nothing has been done; all has


@pytest.fixture(scope="module")
def epochs(cache_dir) -> Path:
    """Texts of which `EPOCH` steps are exactly one epoch."""
    folder = cache_dir / "epochs"
    if not folder.exists():
        folder.mkdir()
        (folder / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(490)))  # the end of it is for val
    return folder


@contextmanager
def copied_at_every_point(run_dir: Path, copies: Path, wanted: list[str] | None) -> Iterator[list[str]]:
    """Before and after each of `CALLS`, copy the run directory: what a process killed there leaves behind."""
    points: list[str] = []
    originals = {(owner, name): getattr(owner, name) for owner, name in CALLS}

    def point(name: str) -> None:
        if wanted is None or name in wanted:
            shutil.copytree(run_dir, copies / name)
            points.append(name)

    def wrap(owner: type, name: str) -> None:
        original, count = originals[owner, name], -1

        def wrapped(self: Any, *args: Any) -> Any:
            nonlocal count
            count += 1
            at = count
            point(f"{name} {at} before")
            result = original(self, *args)
            point(f"{name} {at} after")
            return result

        setattr(owner, name, wrapped)

    for owner, name in CALLS:
        wrap(owner, name)
    try:
        yield points
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


@pytest.fixture
def train(tiny, epochs, tmp_path, monkeypatch) -> Callable[..., Path]:
    """`train("folder", **changes)`: that run, begun or gone on with."""
    for what_is_said in ("_sample", "closing_table"):  # half the time of so short a run
        monkeypatch.setattr(session, what_is_said, lambda *of: "")

    def go(folder: str, **changes: object) -> Path:
        settings = SHAPE | DROPOUT | {"data.path": str(epochs)} | changes
        return run_config(tiny(run_dir=str(tmp_path / folder), **settings)).run_dir

    return go


def resumed_everywhere(train, tmp_path: Path, wanted: list[str] | None, **settings: object) -> tuple[list[str], int]:
    """The points at which a run was resumed to other bytes than the uninterrupted one's, and how many there were."""
    with copied_at_every_point(tmp_path / "whole", tmp_path / "copies", wanted) as points:
        whole = train("whole", **settings)
    assert [step for step, _ in load_run(whole).checkpoints] == [2, 4, 6, 8]
    other = [name for name in points if not same(train(f"copies/{name}", **settings), whole)]
    return other, len(points)


def test_three_steps_are_an_epoch(train):
    config = load_run(train("run")).config
    from normfree.data.packing import prepare

    corpus = prepare(config.data, lambda text: None)
    assert Batches(corpus.tokens("train"), 16, 8, 1).n_blocks == EPOCH * 8


@pytest.mark.parametrize("model", MODELS)
def test_resumed_from_any_kind_of_point_it_ends_with_the_same_bytes(train, tmp_path, model):
    """Every later checkpoint among them."""
    wanted = SOME if model == "gpt2, no norm" else FEW
    assert resumed_everywhere(train, tmp_path, wanted, **MODELS[model]) == ([], len(wanted))


def test_dropout_that_follows_from_more_than_the_step_is_caught(train, tmp_path, monkeypatch):
    """The control: seeds that count the calls of the process. Only where nothing was resumed do they agree."""
    calls = iter(range(10**6))
    monkeypatch.setattr(Trainer, "seed_dropout", lambda self, step, micro: seed_dropout(self.config, next(calls), 0))
    wanted = ["save 0 after", f"train_step {EPOCH} after", "save 3 after"]
    other, _ = resumed_everywhere(train, tmp_path, wanted, **MODELS["gpt2, no norm"])
    assert other == wanted[:2], "after the last checkpoint there is nothing left to drop out of"


COMPILED = MODELS["gpt2, no norm"] | {"train.compile": True, "train.deterministic": True, "model.n_layer": 1}


@pytest.mark.soak
def test_compiled_and_deterministic_it_is_as_exact(train, tmp_path):
    assert resumed_everywhere(train, tmp_path, FEW, **COMPILED) == ([], len(FEW))


@pytest.mark.soak
@pytest.mark.parametrize("model", MODELS)
def test_resumed_from_any_point_it_ends_with_the_same_bytes(train, tmp_path, model):
    settings = MODELS[model] | {"diagnostics.statistics": None}
    other, count = resumed_everywhere(train, tmp_path, None, **settings)
    print(f"{count} points")
    assert not other
    assert count == 2 * (4 + 3 + STEPS + STEPS + 1)


# -- twice ------------------------------------------------------------------------------------------------------------

TWICE = f"""
import sys
sys.argv, words = ["run.py"], sys.argv[1:]
from normfree.cli import main
sys.exit(main(words) or main(["--plugin", {str(Path(__file__).parent / "bad_jobs.py")!r}, *words, "model.act=hashing"]))
"""
SMALL = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "model.dropout.resid=0.1"]
SMALL += ["train.max_steps=4", "train.batch_size=4", "train.eval_tokens=64", "diagnostics.every=2", "log.every=1"]
SMALL += ["data=files", "data.tokenizer=trained", "data.vocab_size=300", "log.tensorboard=false", "log.figures=false"]
HERE = {"TZ": "XXX-14", "PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
THERE = {"TZ": "YYY+11", "PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}


def everything(folder: Path) -> dict[str, object]:
    """All that was left in a folder, by path, down to the cached tokens; without times."""
    found: dict[str, object] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for run_dir in (folder / "runs").iterdir():
        status = {k: v for k, v in load_run(run_dir).status.items() if k != "tokens_per_second"}
        found |= {f"runs/{run_dir.name}/{name}": value for name, value in record(run_dir).items()}
        found[f"runs/{run_dir.name}/run.json"] = status
    return found


def test_what_surrounds_the_process_changes_no_byte(tmp_path):
    """Another time zone, directory, hash seed and locale, and a corpus made anew. Control: an activation by hash()."""
    (tmp_path / "texts").mkdir()
    for i in range(20):
        lines = [f"größe_{j * i % 17} = {j}  # naïve – {i * j}\n" for j in range(40)]
        (tmp_path / "texts" / f"{i}.py").write_text("".join(lines), encoding="utf-8")
    left = []
    for name, surroundings in (("here", HERE), ("so/wo änders", THERE)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        environment = os.environ | surroundings | {"XDG_CACHE_HOME": str(folder / "cache")}
        command = [sys.executable, "-c", TWICE, *SMALL, f"data.path={tmp_path / 'texts'}"]
        environment["PYTHONPATH"] = str(Path(cli.__file__).parent.parent)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        left.append(everything(folder))
    here, there = left
    assert here.keys() == there.keys()
    other = {name for name in here if here[name] != there[name]}
    assert other, "the control"
    assert all("hashing" in name for name in other)
    assert any(name.startswith("cache/") for name in here)

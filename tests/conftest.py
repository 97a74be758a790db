"""Small corpora and configurations. No test needs a network, a GPU, or more than one core."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share two cores; and thread counts change last bits
os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfree.config import Config
from normfree.runs import Run, load_run

WORDS = [
    "def",
    "class",
    "return",
    "self",
    "import",
    "value",
    "layer",
    "head",
    "for",
    "in",
    "if",
    "x",
    "y",
    "step",
    "loss",
]


APART = ("gpu", "browser", "soak")  # what a plain `pytest` leaves out; `pytest -m gpu -n 0` runs it
_left_out = pytest.StashKey[dict[str, list[str]]]()  # mark -> test files, one entry a test


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_left_out] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr"):
        return
    for mark in APART:
        apart = [item for item in items if item.get_closest_marker(mark)]
        items[:] = [item for item in items if item not in apart]
        config.hook.pytest_deselected(items=apart)
        if apart:
            config.stash[_left_out][mark] = [item.nodeid.partition("::")[0] for item in apart]


# Under `-n 2` only the workers collect: each hands on what it left out, and every worker's list is the same.
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_left_out].update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for mark, files in config.stash[_left_out].items():
        where = ", ".join(sorted(set(files)))
        terminalreporter.write_line(f"deselected: {len(files)} {mark} tests (pytest -m {mark} -n 0): {where}")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One token cache for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path) -> None:
    """Caches and run directories stay inside the test's own folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def text_folder(cache_dir: Path) -> Path:
    """60 little documents of random words."""
    folder = cache_dir / "texts"
    if not folder.exists():
        draw = random.Random(0)
        temporary = cache_dir / f"texts-{os.getpid()}"
        temporary.mkdir()
        for i in range(60):
            lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(40)]
            (temporary / f"{i:02}.py").write_text("\n".join(lines) + "\n")
        try:
            temporary.rename(folder)
        except OSError:  # the other test process was first
            assert folder.exists()
    return folder


@pytest.fixture
def tiny(text_folder: Path) -> Callable[..., Config]:
    """`tiny(**{"optim.lr": 1e-2})`: a configuration that trains in a second."""

    def build(**changes: Any) -> Config:
        config = Config(name="tiny")
        base = {
            "model.n_layer": 2,
            "model.n_head": 2,
            "model.n_embd": 16,
            "model.block_size": 16,
            "data.source": "files",
            "data.path": str(text_folder),
            "data.tokenizer": "bytes",
            "optim.lr": 1e-2,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "train.max_steps": 6,
            "train.batch_size": 8,
            "train.eval_every": 3,
            "train.eval_tokens": 256,
            "train.checkpoint_every": 2,
            "diagnostics.every": 2,
            "diagnostics.probe_sequences": 2,
            "log.every": 1,
            "log.tensorboard": False,
            "log.figures": False,
        }
        for name, value in (base | changes).items():
            *sections, leaf = name.split(".")
            target: Any = config
            for section in sections:
                target = getattr(target, section)
            assert hasattr(target, leaf), name
            setattr(target, leaf, value)
        return config

    return build


@pytest.fixture
def train_tiny(tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Run]:
    """Train a tiny run in `tmp_path/<folder>` and open it."""
    from normfree.cli import run_config

    def go(folder: str = "run", **changes: Any) -> Run:
        result = run_config(tiny(run_dir=str(tmp_path / folder), **changes))
        return load_run(result.run_dir)

    return go

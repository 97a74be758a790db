"""No test here reaches the network or the user's cache: every address it could ask refuses at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import quiet, write_corpus

from normfree.config import DataConfig
from normfree.data.packing import Corpus, prepare

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.setenv(name, NOWHERE)
    for name in ("NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The default corpus."""
    return prepare(DataConfig(cache_dir=str(tmp_path_factory.mktemp("stdlib"))), quiet)


@pytest.fixture
def python() -> Callable[..., subprocess.Popen[str]]:
    """Start a Python of its own, with another seed of its string hash each time it is called."""
    started = 0

    def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        nonlocal started
        started += 1
        environment = os.environ | {"PYTHONHASHSEED": str(started), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture
def small(tmp_path: Path) -> DataConfig:
    """Settings for a small corpus of the user's own files, in four packages."""
    root = write_corpus(tmp_path / "text")
    return DataConfig(source="files", path=str(root), tokenizer="bytes", seq_len=32, cache_dir=str(tmp_path / "made"))

"""Three small runs with every array, one of them lost; made once a session."""

import sys
from pathlib import Path

import pytest

from normfree.runs import Run

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # helpers beside, and those all folders share
from many_runs import HOSTILE, make_full_run  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: a clean one, one that is lost at record 20 of 30, and one of other shape, T and steps."""
    folder = tmp_path_factory.mktemp("runs")
    make_full_run(folder / "a", name="clean")
    make_full_run(folder / "b", name="lost", seed=2, fault_at=20, lr=1e-2)
    make_full_run(folder / "c", name=HOSTILE, seed=3, n_layer=3, n_head=4, T=64, every=15)
    return folder


@pytest.fixture(scope="session")
def runs(folder: Path) -> list[Run]:
    from normfree.runs import expand

    return expand([folder])

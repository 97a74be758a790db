"""Fixture runs of 1 x 1, 6 x 8 and 24 x 16 heads, clean and with NaN, made once a session."""

import sys
from pathlib import Path
from typing import Any

import pytest

from normfree.runs import Run

sys.path.append(str(Path(__file__).parents[1]))  # tests/, for what its folders share
from fixtures.make_runs import make_run  # noqa: E402

SHAPES = ((1, 1), (6, 8), (24, 16))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for n_layer, n_head in SHAPES:
        size = f"{n_layer}x{n_head}"
        found[size] = make_run(folder / size, n_layer, n_head, name=f"clean-{size}")
        found[f"nan-{size}"] = make_run(
            folder / f"nan-{size}", n_layer, n_head, name=f"nan-{size}", norm="layernorm", act="gelu", nan_from=300
        )
    found["long"] = make_run(folder / "long", name="long", seq_len=256)
    found["one"] = make_run(folder / "one", name="one", steps=(500,), lr=3e-3)
    return found


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two configurations of three seeds; one run of the second diverges at step 300."""
    for seed in (1, 2, 3):
        make_run(tmp_path / "sweep" / f"a-s{seed}", seed=seed)
        lost: dict[str, Any] = {"status": "diverged", "lost_from": 300} if seed == 3 else {}
        make_run(tmp_path / "sweep" / f"b-s{seed}", seed=seed, norm="layernorm", **lost)
    return tmp_path / "sweep"

"""Faults planted at 50 random sites of compiled runs: pytest -m gpu -n 10 tests/gpu/test_planted_faults.py"""

import pytest
import torch
from planting import names, planted_run, sites

from normfree.training.replaying import replay

pytestmark = pytest.mark.gpu
SHARDS = 10  # test processes compile at the same time, five sites each


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("precision", ["bf16"])
def test_a_compiled_run_names_planted_faults_exactly(tiny, tmp_path, shard, precision):
    """At most two of the 50 may be missed: here, none of these five."""
    changes = {"train.device": "cuda", "train.compile": True, "train.precision": precision}
    missed, moved = [], []
    for i, (settings, *site) in list(enumerate(sites(50)))[shard::SHARDS]:
        phase, path, _, value = site
        pm = planted_run(tiny, tmp_path / str(i), settings, *site, **changes)
        if pm is None or not names(pm.finding, phase, path, value):
            missed.append((site, pm and pm.finding))
            continue
        result = replay(pm, torch.device("cuda"))
        if result.verdict != "planted" or not result.same_place or not result.passes[0].bad:
            moved.append((site, result))
    print(f"{5 - len(missed)} of 5 named exactly, {len(moved)} found elsewhere by the replay")
    assert not missed
    assert not moved

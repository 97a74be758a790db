"""What one process compiles the next one finds: python -m pytest -m gpu tests/gpu"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

STEP = """
import torch
from torch._dynamo.utils import compilation_time_metrics, counters
from normfree.config import ModelConfig
from normfree.model import Transformer, init_weights
from normfree.training import machine

model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=128, vocab_size=512)).cuda()
init_weights(model, 0)
idx = torch.zeros(64, 128, dtype=torch.int64, device="cuda")
with machine.process_flags(False):
    step = machine.compiled(model, True)
    with torch.autocast("cuda", dtype=torch.bfloat16), model.fast_paths(True):
        step(idx, idx).sum.backward()
torch.cuda.synchronize()
trials = len(compilation_time_metrics.get("CachingAutotuner.benchmark_all_configs", []))
print("found", counters["aot_autograd"]["autograd_cache_hit"], trials)
"""


def test_a_second_start_compiles_nothing_and_tries_no_configuration(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "a"), "TRITON_CACHE_DIR": str(tmp_path / "b")}
    found = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True)
        found.append([int(word) for word in out.stdout.split()[-2:]])
    (hits, trials), second = found
    assert hits == 0
    assert trials > 0, "there are kernels with a choice"
    assert second == [1, 0]

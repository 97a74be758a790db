"""Looking changes nothing: python -m pytest -m gpu -n 0 tests/gpu/test_statistics.py"""

import pytest
import torch

from normfree.config import ModelConfig
from normfree.diagnostics import Recorder
from normfree.diagnostics.hooks import is_forward
from normfree.model import Transformer, init_weights
from normfree.tables import STATISTICS

pytestmark = pytest.mark.gpu
EVERYTHING = {"diagnostics.watch": "all", "diagnostics.every": 1, "diagnostics.snapshot_every": 1}
NOTHING = {"diagnostics.watch": "off", "diagnostics.every": 0}


@pytest.mark.parametrize("norm", ["none", "layernorm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_fifty_steps_are_bit_identical(train_tiny, compiled, norm):
    settings = {"train.device": "cuda", "train.compile": compiled, "train.precision": "fp32", "model.norm": norm}
    settings |= {"train.deterministic": True, "train.max_steps": 50, "train.checkpoint_every": 0, "optim.lr": 1e-3}
    runs = [train_tiny(name, **settings, **more) for name, more in (("with", EVERYTHING), ("without", NOTHING))]
    one, two = (run.checkpoints[-1][1] / "model.safetensors" for run in runs)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_a_compiled_step_in_bf16_stays_within_what_compiling_again_changes(norm):
    """One step of the same model: compiled, compiled once more, and compiled with everything recorded."""
    idx = torch.randint(0, 512, (16, 128), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def step(record: bool) -> tuple[float, torch.Tensor]:
        torch.compiler.reset()
        model = Transformer(ModelConfig(norm=norm, act="gelu", vocab_size=512, block_size=128)).cuda()
        init_weights(model, 0)
        recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)])
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        if record:
            recorder.start()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(idx, idx).sum / idx.numel()
        loss.backward()
        if record:
            recorder.unpack(recorder.stop().cpu())
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (loss, grad), (loss_2, grad_2), (loss_3, grad_3) = step(False), step(False), step(True)
    again, recorded = ((g - grad).norm() / grad.norm() for g in (grad_2, grad_3))
    print(f"{norm}: loss {loss:.6f}, again {loss_2 - loss:.1e}, recorded {loss_3 - loss:.1e}")
    print(f"{norm}: gradients relative to their norm: again {again:.1e}, recorded {recorded:.1e}")
    assert abs(loss_3 - loss) <= abs(loss_2 - loss) + 1e-6 * abs(loss)
    assert recorded <= again + 1e-6

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
    ways = {"with": EVERYTHING, "without": NOTHING, "some": {"diagnostics.statistics": ["peak", "attn_entropy"]}}
    runs = [train_tiny(name, **settings, **more) for name, more in ways.items()]
    one, two, three = ((run.checkpoints[-1][1] / "model.safetensors").read_bytes() for run in runs)
    assert one == two == three


@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_a_compiled_step_in_bf16_stays_within_what_compiling_otherwise_changes(norm):
    """One step of the same model: compiled as a whole, block by block, and as a whole with everything recorded.

    Compiling the same way twice gives the same kernels, so the spread of compilation is that between two plain ways.
    """
    idx = torch.randint(0, 512, (16, 128), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def step(way: str) -> tuple[float, torch.Tensor]:
        torch.compiler.reset()
        model = Transformer(ModelConfig(norm=norm, act="gelu", vocab_size=512, block_size=128)).cuda()
        init_weights(model, 0)
        recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)])
        for part in model.blocks if way == "blocks" else [model]:
            part.compile(fullgraph=True, dynamic=False)
        if way == "recorded":
            recorder.start()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(idx, idx).sum / idx.numel()
        loss.backward()
        if way == "recorded":
            recorder.unpack(recorder.stop().cpu())
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (loss, grad), (loss_2, grad_2), (loss_3, grad_3) = step("whole"), step("blocks"), step("recorded")
    blocks, recorded = ((g - grad).norm() / grad.norm() for g in (grad_2, grad_3))
    print(f"{norm}: loss {loss:.6f}, blocks {loss_2 - loss:.1e}, recorded {loss_3 - loss:.1e}")
    print(f"{norm}: gradients relative to their norm: blocks {blocks:.1e}, recorded {recorded:.1e}")
    # A loss in float32 of logits in bfloat16, which round by 4e-3 of themselves: the mean over 2048 of them moves less.
    assert abs(loss_3 - loss) <= abs(loss_2 - loss) + 1e-5 * abs(loss)
    assert recorded <= 1.5 * blocks + 1e-6

"""Checkpoints of any tensors: every bit comes back, whatever it means as a number."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from normfree.config import Config, DataConfig, ModelConfig, resolve
from normfree.model import Transformer, init_weights
from normfree.training import checkpoint as ckpt
from normfree.training.optimizer import build_optimizer

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SHAPES = st.one_of(st.just(()), st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple))
# Bit patterns: NaN with a payload and a sign, -0.0, the smallest number, infinity, all ones.
ODD = [
    b"\xef\xbe\xc0\x7f",
    b"\x01\x00\xa0\xff",
    b"\x00\x00\x00\x80",
    b"\x01\x00\x00\x00",
    b"\x00\x00\x80\x7f",
    b"\xff" * 4,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    n = torch.Size(shape).numel() * dtype.itemsize
    content = bytearray((draw(st.one_of(st.sampled_from(ODD), st.binary(min_size=4, max_size=9))) * (n // 4 + 1))[:n])
    if dtype == torch.bool:
        content = bytearray(byte & 1 for byte in content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(content, dtype=dtype).view(shape) if n else torch.zeros(shape, dtype=dtype)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
TREES = st.dictionaries(NAMES, tensors(), max_size=5)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture(scope="module")
def small():
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 64}
    config = resolve(Config(name="small", model=ModelConfig(**shape), data=DataConfig(seq_len=8)))
    model = Transformer(config.model)
    init_weights(model, seed=1)
    return config, model, build_optimizer(model, config.optim)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES)
def test_any_tree_comes_back_bit_for_bit(tmp_path, small, tree):
    config, model, optimizer = small
    ckpt.save_checkpoint(tmp_path, 1, config, model, optimizer, tree)
    found = {name: torch.zeros_like(tensor) for name, tensor in tree.items()}
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    assert ckpt.load_training_state(model, optimizer, found, checkpoint) == 1
    assert all(same_bits(found[name], tensor) for name, tensor in tree.items())
    assert load_file(checkpoint / "optimizer.safetensors").keys() == {f"extra/{name}" for name in tree}


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.lists(st.sampled_from(ODD), min_size=8, max_size=8))
def test_weights_and_moments_come_back_bit_for_bit(tmp_path, small, values):
    config, model, _ = small
    optimizer = build_optimizer(model, config.optim)
    odd = torch.frombuffer(bytearray(b"".join(values)), dtype=torch.float32)
    wanted = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.view(-1)[:8].copy_(odd[: p.numel()])
            wanted[name] = p.clone()
            optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": p.clone(), "exp_avg_sq": p.clone()}
    finite = ckpt.save_checkpoint(tmp_path, 1, config, model, optimizer, {})
    assert finite == bool(odd.isfinite().all())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    again = build_optimizer(model, config.optim)
    ckpt.load_training_state(model, again, {}, tmp_path / "checkpoints" / "step-00000001")
    for name, p in model.named_parameters():
        for tensor in (p.detach(), again.state[p]["exp_avg"], again.state[p]["exp_avg_sq"]):
            assert same_bits(tensor, wanted[name]), name


def test_a_comparison_by_value_would_not_notice():
    """The control: -0.0 equals 0.0, and a NaN is no other NaN, by their values; by their bits they differ."""
    zero, negative = torch.tensor(0.0), torch.tensor(-0.0)
    assert zero.equal(negative)
    assert not same_bits(zero, negative)
    nan = torch.frombuffer(bytearray(ODD[0]), dtype=torch.float32)
    assert not nan.equal(nan.clone())
    assert same_bits(nan, nan.clone())

"""Hooks: what they count, where, and that they cannot fail to fire unnoticed."""

import numpy as np
import pytest
import torch

from normfree import register_statistic
from normfree.config import ModelConfig
from normfree.diagnostics import STATISTICS, Recorder, Statistic, attention_entropy
from normfree.diagnostics.hooks import is_forward
from normfree.model import Transformer, init_weights
from normfree.runs import SITES

NAMES = ["attn_entropy", "nan_count", "inf_count"]


@pytest.fixture
def model():
    model = Transformer(ModelConfig(n_layer=4, n_head=2, n_embd=16, block_size=16, vocab_size=64, norm="none"))
    init_weights(model, 0)
    return model


IDX = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))


def record(model, names=NAMES, passes=1):
    recorder = Recorder(model, names)
    recorder.start(passes)
    for _ in range(passes):
        model(IDX)
    return recorder.unpack(recorder.stop())


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("kind", ["attn.proj", "mlp.fc"])
def test_a_nan_appears_first_in_the_block_where_it_was_planted(model, layer, kind):
    """In one weight of block k: nothing below, something at k, everything above."""
    weight = model.get_submodule(f"blocks.{layer}.{kind}").weight
    weight.data[0, 0] = float("nan")
    counts = record(model)["nan_count"]
    block = counts[SITES.index("block")]
    assert (block[:layer] == 0).all()
    assert block[layer] > 0
    assert (block[layer + 1 :] == 3 * 16 * 16).all(), "every element above it"
    assert counts[SITES.index("attn"), layer] == (3 * 16 if kind == "attn.proj" else 0)
    assert counts[SITES.index("attn_probs"), layer] == 0, "its own attention had not seen it"
    assert (counts[SITES.index("attn_probs"), layer + 1 :] == 3 * 2 * 16 * 16).all(), "all of B H T T above it"


def test_nan_entropy_is_nan_never_zero(model):
    model.blocks[2].attn.qkv.weight.data[0, 0] = float("nan")  # one query dimension of head 0
    entropy = record(model)["attn_entropy"]
    assert np.isnan(entropy[2, 0])
    assert np.isfinite(entropy[:2]).all()
    assert np.isfinite(entropy[2, 1])
    assert np.isnan(entropy[3]).all()


def test_infinities_are_counted_apart(model):
    model.blocks[1].mlp.proj.bias.data[3] = float("inf")
    arrays = record(model)
    mlp = SITES.index("mlp")
    assert arrays["inf_count"][mlp].tolist()[:2] == [0, 3 * 16]
    assert arrays["nan_count"][mlp].tolist()[:2] == [0, 0]


def test_entropy_is_of_the_q_and_k_that_were_used(model):
    seen = []
    model.blocks[1].attn.inner_attention.register_forward_hook(lambda m, args, out: seen.append(args[:2]))
    found = record(model)["attn_entropy"][1]
    assert found == pytest.approx(attention_entropy(*seen[0]).mean(dim=(0, 2)).detach().numpy(), abs=1e-6)


def test_micro_batches_mean_and_sum(model):
    model.blocks[0].attn.proj.weight.data[0, 0] = float("nan")
    once, thrice = record(model), record(model, passes=3)
    assert thrice["attn_entropy"][0] == pytest.approx(once["attn_entropy"][0], abs=1e-6)
    assert (thrice["nan_count"] == 3 * once["nan_count"]).all()


def test_hooks_that_do_not_fire_are_an_error(model):
    recorder = Recorder(model, NAMES)
    recorder.start(2)
    model(IDX)
    with pytest.raises(RuntimeError, match="1 forward passes, not 2"):
        recorder.unpack(recorder.stop())


def test_switched_off_they_write_nothing(model):
    recorder = Recorder(model, NAMES)
    recorder.start()
    recorder.stop()
    model(IDX)
    assert recorder.passes[1] == 0


def test_removed_they_are_gone(model):
    recorder = Recorder(model, NAMES)
    recorder.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_statistic_of_ones_own(model):
    @register_statistic("my_max")
    class MyMax(Statistic):
        over_micro_batches = "max"

        def measure(self, seen):
            return seen.output.abs().amax()

    try:
        seen = []
        model.blocks[3].register_forward_hook(lambda m, args, out: seen.append(out.abs().max().item()))
        found = record(model, ["my_max"], passes=2)["my_max"]
        assert found.shape == (4,)
        assert found[3] == pytest.approx(seen[0])
    finally:
        STATISTICS.remove("my_max")


@pytest.mark.parametrize("level", ["residual", "all", "record"])
def test_a_compiled_pass_records_what_an_eager_one_does(model, level):
    """As one graph, at every level; the count of passes would raise if the hooks had been left out of it."""
    recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    arrays = []
    for forward in (model, compiled):
        compiled(IDX, IDX)  # the level is "off": another variant
        recorder.start(2, level)
        for _ in range(2):
            forward(IDX, IDX).sum.backward()
        arrays.append(recorder.unpack(recorder.stop()))
    for name, value in arrays[0].items():
        assert arrays[1][name] == pytest.approx(value, abs=1e-5, nan_ok=True), name


def test_each_level_measures_what_it_says(model):
    recorder = Recorder(model, [name for name in STATISTICS if is_forward(name)])
    found = {}
    for level in ("residual", "all", "record"):
        recorder.start(level=level)
        model(IDX)
        found[level] = recorder.unpack(recorder.stop())
    for name in recorder.watch_names:
        assert found["all"][name] == pytest.approx(found["record"][name]), name
    assert (found["residual"]["resid_max"] == found["record"]["resid_max"]).all()
    assert (found["residual"]["attn_entropy"] == 0).all(), "not measured"
    assert found["record"]["position_entropy"].mean(-1) == pytest.approx(found["all"]["attn_entropy"], abs=1e-6)


@pytest.mark.parametrize("site", ["mlp_pre", "mlp_hidden"])
def test_the_inside_of_the_feed_forward_layer_can_be_watched_at_every_step(site):
    class Inside(Statistic):
        sites = every_step = (site,)

        def measure(self, seen):
            return seen.output.abs().amax()

    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
    init_weights(model, 0)
    recorder = Recorder(model, {"inside": Inside}, 8)
    recorder.start(1, "all")
    assert model.blocks[0].mlp.look
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert (recorder.unpack(recorder.stop())["inside"] > 0).all()


def test_a_statistic_of_v_sees_v_also_when_it_is_alone():
    class Largest(Statistic):
        sites = ("v",)

        def measure(self, seen):
            return seen.output.abs().amax()

    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
    init_weights(model, 0)
    found = []
    for more in ({}, {"attn_entropy": STATISTICS["attn_entropy"]}):
        recorder = Recorder(model, {"largest": Largest, **more}, 8)
        recorder.start()
        model(torch.arange(8)[None])
        found.append(recorder.unpack(recorder.stop())["largest"])
        recorder.remove()
    assert found[0].tolist() == found[1].tolist()


def test_a_statistic_that_gives_nothing_is_left_out():
    class Forgetful(Statistic):
        def measure(self, seen):
            seen.output.abs()

    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
    init_weights(model, 0)
    recorder = Recorder(model, {"forgetful": Forgetful}, 8)
    recorder.start()
    model(torch.arange(8)[None])
    recorder.stop()
    assert "not a tensor" in recorder.failed["forgetful"]

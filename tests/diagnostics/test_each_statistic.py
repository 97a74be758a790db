"""What each statistic computes: against plain torch on the tensors that the same forward pass was seen to hold."""

import random
import re
from fnmatch import fnmatch

import numpy as np
import pytest
import torch

from normfree import heads
from normfree.config import ModelConfig
from normfree.diagnostics import STATISTICS, Recorder, statistics
from normfree.diagnostics.census import count_non_finite, peak
from normfree.diagnostics.hooks import is_forward
from normfree.model import Transformer, init_weights
from normfree.runs import IN_ORDER, SITES

LAYERS, HEADS, WIDTH, T, VOCAB = 2, 2, 16, 12, 64
FORWARD = [name for name in STATISTICS if is_forward(name)]
NAN, INF = float("nan"), float("inf")
CARRIED_BY = {"v": "attn", "mlp_hidden": "mlp"}  # whose peak stands for a site's that has none


def build(**changes):
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": T, "vocab_size": VOCAB, "norm": "none"}
    model = Transformer(ModelConfig(**shape | changes))
    init_weights(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "qkv" in name else 2)  # attention that is far from uniform
    return model


@pytest.fixture
def model():
    return build()


def batch(seed, sequences=3, length=T):
    return torch.randint(0, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


# -- the tensors themselves -------------------------------------------------------------------------------------------


def watch(model):
    """A list that gets, at every forward pass, one dict a layer: site -> what was there."""
    passes = []

    def keep(layer, site, tensor):
        if site == "q" and layer == 0:
            passes.append([{} for _ in model.blocks])
        passes[-1][layer][site] = tensor.detach().double()

    for i, block in enumerate(model.blocks):

        def attention(module, args, output, i=i):
            for site, tensor in zip("qkv", args, strict=False):
                keep(i, site, tensor)

        def projection(site, inside, i=i):
            def hook(module, args, output):
                keep(i, inside, args[0])
                keep(i, site, output)

            return hook

        block.attn.inner_attention.register_forward_hook(attention)
        block.attn.proj.register_forward_hook(projection("attn", "joined"))
        block.mlp.fc.register_forward_hook(projection("mlp_pre", "mlp_in"))
        block.mlp.proj.register_forward_hook(projection("mlp", "mlp_hidden"))
        block.register_forward_hook(lambda module, args, output, i=i: keep(i, "block", output))
    return passes


def scores(seen):
    """(B, H, T, T), -inf where the key comes after the query."""
    s = seen["q"] @ seen["k"].transpose(2, 3) / seen["q"].size(3) ** 0.5
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INF)


def probabilities(seen):
    return scores(seen).softmax(-1)


def entropy(seen):
    """(B, H, T)"""
    return torch.special.entr(probabilities(seen)).sum(-1)


def at(seen, site):
    return probabilities(seen) if site == "attn_probs" else seen[site]


def level(seen):
    """Entropies over their ceilings, without row 0: (H, rows)."""
    r = entropy(seen)[:, :, 1:].numpy() / heads.row_ceiling(np.arange(1, seen["q"].size(2)))
    return r.transpose(1, 0, 2).reshape(r.shape[1], -1)


def by_site(function, sites):
    return lambda seen: torch.stack([function(at(seen, site)) for site in sites])


# name: (one layer's value in one pass, how passes are put together, where the axis of layers stands)
DIRECT = {
    "attn_entropy": (lambda seen: entropy(seen).mean((0, 2)), np.mean, 0),
    "max_score": (lambda seen: scores(seen).amax((0, 2, 3)), np.max, 0),
    "sink_mass": (lambda seen: probabilities(seen)[..., 0].mean((0, 2)), np.mean, 0),
    "one_minus_max": (lambda seen: (1 - probabilities(seen).amax(-1))[:, :, 1:].mean((0, 2)), np.mean, 0),
    "nan_count": (by_site(lambda x: x.isnan().sum(), SITES), np.sum, 1),
    "inf_count": (by_site(lambda x: x.isinf().sum(), SITES), np.sum, 1),
    "peak": (by_site(lambda x: x.abs().amax(), ("q", "k", "attn", "mlp")), np.max, 1),
    "resid_max": (lambda seen: seen["block"].abs().amax(), np.max, 0),
    "resid_rms": (lambda seen: seen["block"].square().mean().sqrt(), np.mean, 0),
    "mlp_pre_std": (lambda seen: seen["mlp_pre"].std(unbiased=False), np.mean, 0),
    "position_entropy": (lambda seen: entropy(seen).mean(0), np.mean, 0),
    "entropy_quantiles": (
        lambda seen: torch.from_numpy(np.quantile(level(seen), heads.QUANTILES, axis=1).T),
        np.mean,
        0,
    ),
    "effective_width": (lambda seen: entropy(seen).exp().mean((0, 2)), np.mean, 0),
}


def direct(name, passes):
    function, together, axis = DIRECT[name]
    return together([np.stack([function(seen).numpy() for seen in layers], axis) for layers in passes], axis=0)


def record(model, batches, names=FORWARD, seq_len=T):
    """What the recorder says of the forward passes over `batches`, and what was seen in them."""
    recorder, passes = Recorder(model, names, seq_len), watch(model)
    recorder.start(len(batches))
    for idx in batches:
        model(idx)
    return recorder.unpack(recorder.stop()), passes


@pytest.fixture(scope="module")
def recorded():
    return record(build(), [batch(seed) for seed in range(3)])


@pytest.mark.parametrize("name", FORWARD)
def test_every_statistic_is_what_it_says_over_three_micro_batches(recorded, name):
    arrays, passes = recorded
    expected = direct(name, passes)
    assert arrays[name].shape == expected.shape
    assert arrays[name] == pytest.approx(expected, rel=2e-5, abs=2e-6)
    if STATISTICS[name].dtype == torch.float32:
        single = [direct(name, [layers]) for layers in passes]
        assert not np.allclose(single[0], expected, rtol=1e-4), "the micro-batches are all alike: the test is blind"


def test_attention_of_this_model_is_neither_uniform_nor_one_hot(recorded):
    """Otherwise the comparison above would compare constants."""
    arrays, _ = recorded
    assert ((arrays["attn_entropy"] / heads.entropy_ceiling(T) > 0.1) & (arrays["one_minus_max"] > 0.05)).all()
    assert (arrays["attn_entropy"] / heads.entropy_ceiling(T) < 0.95).all()
    assert np.ptp(arrays["entropy_quantiles"], axis=-1).min() > 0.1


def test_at_a_sequence_of_one_token_there_is_nothing_to_spread(model):
    arrays, _ = record(model, [batch(0, length=1)], seq_len=1)
    assert (arrays["attn_entropy"] == 0).all()
    assert (arrays["one_minus_max"] == 0).all()
    assert (arrays["sink_mass"] == 1).all()
    assert (arrays["effective_width"] == 1).all()
    assert arrays["position_entropy"].shape == (LAYERS, HEADS, 1)
    assert arrays["entropy_quantiles"].shape == (LAYERS, HEADS, len(heads.QUANTILES))
    assert np.isnan(arrays["entropy_quantiles"]).all(), "0 / ln 1"


@pytest.mark.parametrize("name", ["entropy_quantiles", "mlp_pre_std"])
def test_large_batches_are_sampled_from_the_front(model, monkeypatch, name):
    monkeypatch.setattr(statistics, "SAMPLED_ROWS", 2 * T)
    arrays, passes = record(model, [batch(0, sequences=5)], [name])
    function = DIRECT[name][0]
    front = [{site: tensor[:2] for site, tensor in seen.items()} for seen in passes[0]]
    assert arrays[name] == pytest.approx(np.stack([function(seen).numpy() for seen in front]), rel=2e-5, abs=2e-6)
    assert arrays[name] != pytest.approx(direct(name, passes), rel=1e-4), "all of it would give the same"


# -- what is not finite -----------------------------------------------------------------------------------------------


def plant(model, layer, site, values, draw):
    """Put `values` into elements of `site` in block `layer`. Returns a function that stops it."""
    block = model.blocks[layer]

    def planted(x):
        x = x.contiguous().clone()
        for i, value in zip(draw.sample(range(x.numel()), len(values)), values, strict=True):
            x.view(-1)[i] = value
        return x

    def attention_input(module, args):
        return tuple(planted(x) if name == site else x for name, x in zip("qkv", args, strict=True))

    if site in ("q", "k", "v"):
        return block.attn.inner_attention.register_forward_pre_hook(attention_input).remove
    module = {"attn": block.attn.proj, "mlp": block.mlp.proj, "mlp_hidden": block.mlp.act, "block": block}[site]
    return module.register_forward_hook(lambda module, args, output: planted(output), prepend=True).remove


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("site", [site for site in SITES if site != "attn_probs"])
def test_planted_values_are_counted_where_they_are_and_where_they_spread(model, site, layer):
    """Site by site and layer by layer as in the tensors themselves, attention probabilities materialised."""
    plant(model, layer, site, [NAN, NAN, INF, -INF, INF], random.Random(0))
    arrays, passes = record(model, [batch(0), batch(1)])
    for name in ("nan_count", "inf_count"):
        assert (arrays[name] == direct(name, passes)).all(), name
    place = SITES.index(site)
    assert (arrays["nan_count"][place, layer], arrays["inf_count"][place, layer]) == (2 * 2, 2 * 3)
    assert not arrays["nan_count"][:, :layer].any(), "the layers below have seen nothing"
    for name in ("attn_entropy", "max_score", "peak", "resid_max"):
        assert arrays[name] == pytest.approx(direct(name, passes), rel=2e-5, abs=2e-6, nan_ok=True), name


def test_no_value_escapes_the_flags_and_the_counts(model):
    """One element at a time, anywhere, beneath a projection whose weights are zero too."""
    recorder, draw = Recorder(model, ["peak", "resid_max", "nan_count", "inf_count"]), random.Random(1)
    for block in model.blocks:
        block.attn.proj.weight.data[:, 3] = 0
        block.mlp.proj.weight.data.zero_()
    flags = {name: i for i, name in enumerate(recorder.statistics["peak"].sites)}
    for i in range(120):
        site, layer = draw.choice(IN_ORDER[:3] + IN_ORDER[4:]), draw.randrange(LAYERS)
        value, level = draw.choice([NAN, INF, -INF]), ("record", "all")[i % 2]
        stop = plant(model, layer, site, [value], draw)
        recorder.start(level=level)
        model(batch(i))
        arrays = recorder.unpack(recorder.stop())
        stop()
        if site == "block":
            assert not np.isfinite(arrays["resid_max"][layer])
        else:
            assert not np.isfinite(arrays["peak"][flags[CARRIED_BY.get(site, site)], layer]), (site, layer, value)
        if level == "record" or site == "block":
            name = "nan_count" if np.isnan(value) else "inf_count"
            assert arrays[name][SITES.index(site), layer] == 1, (site, layer, value)
        assert np.isfinite(arrays["peak"][:, :layer]).all()
        assert np.isfinite(arrays["resid_max"][:layer]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peak_sees_a_nan_at_every_place(dtype):
    for width in range(1, 70):
        x = torch.full((width, width), -INF, dtype=dtype)
        x.fill_diagonal_(NAN)
        assert peak(x).isnan().all(), width
        assert (peak(x.nan_to_num(nan=0.0, neginf=-INF))[1 if width == 1 else 0 :] == INF).all()


def test_nothing_is_counted_behind_a_finite_gate():
    """Which is why every gate above must be finite only where its site is."""
    bad = torch.tensor([NAN, INF, 1.0])
    assert count_non_finite(bad, bad.abs().amax()).sum(0).tolist() == [1, 1]
    assert count_non_finite(bad, torch.tensor(1.0)).sum(0).tolist() == [0, 0]


def test_attention_probabilities_are_counted_exactly_beyond_what_float32_holds():
    """4,099 rows of 4,099 NaN are 16,801,801, an odd number above 2^24."""
    length = 4099
    model = build(n_layer=1, n_head=1, n_embd=2, block_size=length)
    model.blocks[0].attn.qkv.weight.data[0] = NAN
    recorder = Recorder(model, ["nan_count"])
    recorder.start()
    model.hidden(batch(0, sequences=1, length=length))
    counts = recorder.unpack(recorder.stop())["nan_count"]
    assert counts[SITES.index("attn_probs"), 0] == length**2


# -- the table in the module's docstring ------------------------------------------------------------------------------


def documented():
    """name pattern -> what the column "every step" says."""
    lines = re.findall(r"^\| (\w[\w*]*) +\| ([^|]*?) *\|", statistics.__doc__, re.MULTILINE)
    return {name: every for name, every in lines if name != "statistic"}


@pytest.mark.parametrize("name", list(STATISTICS))
def test_the_table_of_statistics_says_when_each_is_measured(name):
    found = [every for pattern, every in documented().items() if fnmatch(name, pattern)]
    assert len(found) == 1, f"{name} is in {len(found)} lines of the docstring's table"
    statistic = STATISTICS[name]
    every_step = getattr(statistic, "every_step", ())
    said = {
        "": (),
        "(snapshots)": (),
        "yes": statistic.sites if is_forward(name) else (),
        "of the block": ("block",),
    }
    assert tuple(every_step) == said.get(found[0], tuple(found[0].split()))
    assert getattr(statistic, "snapshot", False) == (found[0] == "(snapshots)")


def test_the_table_names_nothing_that_is_not_there():
    assert all(any(fnmatch(name, pattern) for name in STATISTICS) for pattern in documented())

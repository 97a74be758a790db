"""Every size has its published shape and, with the published vocabulary, its published number of parameters."""

from pathlib import Path

import pytest
import torch
import yaml

from normfree.config import ModelConfig
from normfree.model import Transformer

CONF = Path(__file__).parents[2] / "conf"
GPT2_VOCAB, PYTHIA_VOCAB = 50257, 50304

# size: (family, vocabulary, (n_layer, n_head, n_embd, block_size), parameters)
# GPT-2: Radford et al. 2019 and the released checkpoints; Pythia: Biderman et al., arXiv:2304.01373, table 1, and the
# released checkpoints (14m and 31m came later).
PUBLISHED = {
    "14m": ("pythia", PYTHIA_VOCAB, (6, 4, 128, 2048), 14_067_712),
    "31m": ("pythia", PYTHIA_VOCAB, (6, 8, 256, 2048), 30_494_720),
    "70m": ("pythia", PYTHIA_VOCAB, (6, 8, 512, 2048), 70_426_624),
    "124m": ("gpt2", GPT2_VOCAB, (12, 12, 768, 1024), 124_439_808),
    "160m": ("pythia", PYTHIA_VOCAB, (12, 12, 768, 2048), 162_322_944),
    "355m": ("gpt2", GPT2_VOCAB, (24, 16, 1024, 1024), 354_823_168),
    "410m": ("pythia", PYTHIA_VOCAB, (24, 16, 1024, 2048), 405_334_016),
    "774m": ("gpt2", GPT2_VOCAB, (36, 20, 1280, 1024), 774_030_080),
    "1b": ("pythia", PYTHIA_VOCAB, (16, 8, 2048, 2048), 1_011_781_632),
    "1.5b": ("gpt2", GPT2_VOCAB, (48, 25, 1600, 1024), 1_557_611_200),
}
NON_EMBEDDING = {"70m": 18_915_328, "160m": 85_056_000, "410m": 302_311_424, "1b": 805_736_448}  # Pythia, table 1


def keys(folder, name):
    values = yaml.safe_load((CONF / folder / f"{name}.yaml").read_text())
    values.pop("defaults", None)
    return values


def on_meta(**values):
    with torch.device("meta"):
        return Transformer(ModelConfig(**values))


def test_every_size_is_tested():
    assert {path.stem for path in (CONF / "size").glob("*.yaml")} == {"nano", *PUBLISHED}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_shape_and_parameters(size):
    family, vocabulary, shape, parameters = PUBLISHED[size]
    values = keys("size", size)
    assert values == dict(zip(("n_layer", "n_head", "n_embd", "block_size"), shape, strict=True))
    model = on_meta(**keys("model", family), **values, vocab_size=vocabulary)
    counts = model.parameter_counts()
    assert counts["total"] == counts["trainable"] == parameters
    if size in NON_EMBEDDING:
        assert counts["non_embedding"] == NON_EMBEDDING[size]


@pytest.mark.parametrize("family", ["gpt2", "normfree"])
def test_nano_has_about_a_million_parameters(family):
    base = keys("model", "gpt2") | keys("model", family)
    total = on_meta(**base, **keys("size", "nano"), vocab_size=8192).parameter_counts()["total"]
    assert 0.8e6 < total < 1.5e6


def test_normfree_lacks_exactly_the_norms_of_the_blocks():
    assert keys("model", "normfree") == {"norm": "none"}
    size = keys("size", "124m")
    full = on_meta(**keys("model", "gpt2"), **size, vocab_size=GPT2_VOCAB)
    free = on_meta(**(keys("model", "gpt2") | {"norm": "none"}), **size, vocab_size=GPT2_VOCAB)
    lost = {name for name, _ in full.named_parameters()} - {name for name, _ in free.named_parameters()}
    sites = [f"blocks.{i}.norm_{j}.{suffix}" for i in range(12) for j in (1, 2) for suffix in ("weight", "bias")]
    assert lost == set(sites)
    difference = full.parameter_counts()["total"] - free.parameter_counts()["total"]
    assert difference == 12 * 4 * 768


def test_shared_tensors_count_once():
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 16}
    tied, untied = on_meta(**shape), on_meta(**shape, tie_embeddings=False)
    assert untied.parameter_counts()["total"] - tied.parameter_counts()["total"] == 16 * 8
    assert untied.parameter_counts()["non_embedding"] == tied.parameter_counts()["non_embedding"]
    for scope, slopes in (("global", 1), ("per_layer", 3)):
        model = on_meta(**shape, act="learnable_leaky_relu", act_scope=scope)
        assert model.parameter_counts()["total"] - tied.parameter_counts()["total"] == slopes


def test_frozen_parameters_are_not_trainable():
    model = on_meta(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=16)
    model.blocks[0].mlp.fc.bias.requires_grad_(False)
    counts = model.parameter_counts()
    assert counts["total"] - counts["trainable"] == 32

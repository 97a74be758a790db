"""Settings: every fault is found before anything is touched, and every key says what it is."""

import dataclasses

import pytest

from normfree.config import Config, ModelConfig, flat_keys, from_dict, resolve, resolve_vocabulary, to_dict
from normfree.errors import UserError
from normfree.identity import weights_differences
from normfree.rules import CHOICES, RANGES, validate

KEYS = {name for name, _, _ in flat_keys(Config())}


def changed(**changes):
    config = Config()
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        target = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, leaf, value)
    return config


def test_the_defaults_are_valid():
    validate(Config())
    validate(resolve(Config()))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.norm", "layrnorm", "layernorm"),
        ("model.act", "rleu", "relu"),
        ("optim.schedule", "cosin", "cosine"),
        ("data.source", "codeparot", "codeparrot"),
        ("optim.lr", 0.0, "(0, 1000]"),
        ("optim.lr", -1.0, "(0, 1000]"),
        ("optim.lr", float("nan"), "(0, 1000]"),
        ("optim.lr", float("inf"), "(0, 1000]"),
        ("model.n_embd", 0, "[1,"),
        ("model.n_embd", 97, "model.n_head=4"),
        ("optim.warmup_steps", 301, "train.max_steps=300"),
        ("data.seq_len", 512, "model.block_size=256"),
        ("train.micro_batch_size", 5, "train.batch_size=16"),
        ("model.dropout.attn", 1.0, "[0, 1)"),
        ("nan_policy", "ignore", "raise"),
        ("data.source", "files", "data.path"),
        ("seed", -1, "[0,"),
    ],
)
def test_a_bad_value_names_its_key_and_what_is_allowed(key, value, says):
    with pytest.raises(UserError) as caught:
        validate(changed(**{key: value}))
    assert key in str(caught.value)
    assert says in str(caught.value)


def test_all_faults_at_once():
    with pytest.raises(UserError) as caught:
        validate(changed(**{"optim.lr": -1.0, "model.act": "rleu", "model.n_layer": 0, "model.n_embd": 97}))
    assert all(key in str(caught.value) for key in ("optim.lr", "model.act", "model.n_layer", "model.n_embd=97"))


def test_rotary_needs_an_even_share_of_the_head():
    with pytest.raises(UserError, match="rotary_pct"):
        validate(changed(**{"model.positions": "rotary", "model.rotary_pct": 0.05}))


def test_rules_speak_of_keys_that_exist():
    assert set(CHOICES) | set(RANGES) <= KEYS


def test_every_key_has_a_line_of_help_and_a_class():
    def fields(cls):
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.type):
                yield from fields(f.type)
            else:
                yield f

    for f in fields(Config):
        assert f.metadata["help"], f.name
        assert isinstance(f.metadata["weights"], bool), f.name


def test_saved_and_read_again():
    config = changed(**{"optim.lr": 3e-4, "model.bias.qk": False})
    assert from_dict(to_dict(config)) == config
    with pytest.raises(UserError, match="unknown key 'n_hed'"):
        from_dict({"n_hed": 3}, ModelConfig)


def test_resolve_fills_what_follows_and_leaves_its_argument_alone():
    config = Config()
    done = resolve(config)
    assert config == Config()
    assert (done.model.n_inner, done.data.seq_len, done.optim.warmup_steps, done.train.micro_batch_size) == (
        4 * 96,
        128,
        30,
        16,
    )


@pytest.mark.parametrize(("norm", "final"), [("none", "layernorm"), ("layernorm", "layernorm"), ("rmsnorm", "rmsnorm")])
def test_the_final_norm_follows_but_stays_without_block_norms(norm, final):
    assert resolve(changed(**{"model.norm": norm})).model.final_norm == final
    assert resolve(changed(**{"model.norm": norm, "model.final_norm": "none"})).model.final_norm == "none"


def test_vocabulary():
    config = Config()
    resolve_vocabulary(config, 50257)
    assert (config.model.vocab_size, config.model.vocab_used) == (50304, 50257)
    with pytest.raises(UserError, match=r"model.vocab_size=100 .* 50257 ids"):
        resolve_vocabulary(changed(**{"model.vocab_size": 100}), 50257)


def test_differences_are_of_keys_that_change_the_weights():
    ours = changed(**{"optim.lr": 0.5, "log.every": 7, "seed": 9})
    assert weights_differences(ours, Config()) == ["seed: 9, not 1", "optim.lr: 0.5, not 0.003"]


@pytest.mark.parametrize(("width", "std"), [(768, 0.0228), (96, 0.0645)])
def test_initial_values_follow_the_width_unless_given(width, std):
    assert resolve(changed(**{"model.n_embd": width})).model.init.std == pytest.approx(std, rel=1e-2)
    assert resolve(changed(**{"model.n_embd": width, "model.init.std": 0.02})).model.init.std == 0.02


@pytest.mark.parametrize("key", [key for key in CHOICES if key not in ("model.final_norm", "train.compile")])
def test_choices_are_spelled_exactly(key):
    """A choice in capitals that passed would be taken for none of the choices further down."""
    value = next(iter(CHOICES[key])).upper()
    with pytest.raises(UserError, match=key):
        validate(changed(**{key: value}))


@pytest.mark.parametrize("value", [True, False, "auto", "true"])
def test_compile_takes_yaml_booleans(value):
    validate(changed(**{"train.compile": value}))


@pytest.mark.parametrize(
    "bad",
    [
        {"model.positions": "rotary", "model.rotary_pct": float("nan")},
        {"data.chunks": "original", "data.seq_len": 1},
        {"name": "../elsewhere"},
    ],
)
def test_further_faults_are_messages(bad):
    with pytest.raises(UserError):
        validate(changed(**bad))

"""Settings: whatever is typed or saved, all that is wrong is said at once, before anything is touched."""

import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from drawn import DEFAULTS, FIXED, WRONG, allowed, as_saved, changed, composed_before
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from normfree import cli
from normfree.cli import run_config
from normfree.config import Config, from_dict, resolve, to_dict
from normfree.errors import EXIT_CONFIG, EXIT_DIVERGED, EXIT_OK, UserError
from normfree.rules import CHOICES, KEYS, RANGES, faults, validate
from normfree.words import groups, read

FUZZ = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
KEY = st.sampled_from(sorted(DEFAULTS))


# -- S23: bad values --------------------------------------------------------------------------------------------------


def bad_value(name: str) -> st.SearchStrategy:
    """Values that are wrong for a key whatever the others are."""
    wrong = [st.just({"a": 1}), st.just(b"x")]
    if name in CHOICES:
        wrong += [st.text(min_size=1).filter(lambda text: text not in CHOICES[name] and text not in ("true", "false"))]
    elif name in RANGES:
        low, high, low_ok, high_ok = RANGES[name]
        wrong += [st.sampled_from([math.nan, -math.inf, low - 1, "3"] + ([] if low_ok else [low, -0.0]))]
        wrong += [] if isinstance(DEFAULTS[name], bool) else [st.just(True)]  # optim.decay_slopes: a switch or a number
        wrong += [st.just(math.inf if math.isinf(high) else high if not high_ok else high * 2 + 1)]
    return st.one_of(wrong)


@settings(max_examples=300, **FUZZ)
@given(
    st.sets(KEY, min_size=1, max_size=6).flatmap(lambda keys: st.fixed_dictionaries({k: bad_value(k) for k in keys}))
)
def test_every_bad_value_is_named_and_all_at_once(changes):
    found = faults(changed(Config(), changes))
    for name in changes:
        assert any(line.startswith((f"{name}=", f"{name}:")) for line in found), name
    assert all(any(line.startswith(name) for name in changes) for line in found), "nothing else is blamed"


@pytest.fixture
def composed_once(monkeypatch):
    """Words that are refused by themselves leave the same rest to compose."""
    monkeypatch.setattr(cli, "_compose", composed_before)


BAD_WORDS = [
    "act=rleu", "model.n_hed=3", "optim.lr=fast", "optim.beta1=1", "optim.eps=nan", "train.batch_size=0.5",
    "model.n_embd=97", "data.seq_len=100000000", "nan_policy=RAISE", "seed=-1", "+model.x=1", "~model.norm",
    "run_dir=${oc.env:HOME}", "log.every=0", "spike_sigma=-0.0", "model.bias.qk=maybe", "train.max_steps=1e400",
    "optim", "=3", "lr=[", "hydra.run.dir=x", "size=null", "log.sample_prompt={a:1}", "name=.hidden",
    "diagnostics.statistics=[nancount]",
]  # fmt: skip


def test_one_command_with_everything_wrong_says_everything(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert cli.main(BAD_WORDS) == EXIT_CONFIG
    said = capfd.readouterr().err
    for word in BAD_WORDS:
        name = word.split("=")[0].strip("+~")
        lines = [line for line in said.splitlines() if name in line]
        assert lines, word
    for meant in ("'relu'", "'model.n_head'", "'raise'", "'nan_count'"):
        assert f"Did you mean {meant}?" in said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_key_with_a_letter_lost_or_doubled_is_recognised():
    missed = []
    for name in KEYS:
        for typo in (name[:-1], name[: len(name) // 2] + name[len(name) // 2 :][1:], name + name[-1]):
            if typo in KEYS or typo in groups():
                continue
            (said,) = read([f"{typo}=1"], multirun=False).problems
            if f"Did you mean {name!r}?" not in said:
                missed.append(typo)
    assert len(missed) <= 6, missed


# -- P1: any configuration --------------------------------------------------------------------------------------------

ANY_KEY = st.one_of(KEY, KEY, st.sampled_from(["model", "debug", "optim", "new", "model.new", "model.act.x"]))


@settings(max_examples=200, **FUZZ)
@given(changes=st.dictionaries(ANY_KEY, WRONG, max_size=4))
@example({"model": None})
@example({"model.act": ["relu"], "optim.lr": "1"})
@example({"optim.lr": 10**400, "model.embed_scale": 10**400})
def test_any_configuration_is_refused_or_comes_back_from_a_file(changes):
    """Typed in Python, or saved: a `UserError` or a configuration, which YAML gives back as it was."""
    sections = {name for name in changes if name in ("model", "debug", "optim")}
    typed = {k: v for k, v in changes.items() if k in sections or (k in DEFAULTS and k.split(".")[0] not in sections)}
    config = changed(Config(), typed)
    try:
        validate(config)
    except UserError:
        pass
    else:
        assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
        assert from_dict(to_dict(resolve(config))) == resolve(config)
        validate(resolve(config))
    with suppress(UserError):
        faults(from_dict(as_saved(changes)))


VALID = st.fixed_dictionaries({name: allowed(name) for name in DEFAULTS if name not in FIXED})


def builds_and_trains(tmp_path: Path, tiny, changes: dict) -> None:
    config = changed(tiny(**{"data.seq_len": 2}), changes)
    if faults(config) or faults(resolve(config)):
        # Valid key by key, and refused for a rule between keys, which is then the only kind of fault.
        assert not [line for line in faults(config) if line.split("=")[0] in RANGES and "outside" in line]
        return
    config.run_dir = str(tmp_path / f"run{len(os.listdir(tmp_path))}")
    result = run_config(config)
    assert result.exit_code in (EXIT_OK, EXIT_DIVERGED), changes
    assert result.status in ("finished", "diverged")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=10, **FUZZ)
@given(changes=VALID)
def test_any_valid_configuration_builds_and_trains_a_step(tmp_path, tiny, changes):
    builds_and_trains(tmp_path, tiny, changes)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=500, **FUZZ)
@given(changes=VALID)
def test_many_valid_configurations_build_and_train_a_step(tmp_path, tiny, changes):
    builds_and_trains(tmp_path, tiny, changes)


def test_a_validation_that_looks_at_less_is_caught(tiny, tmp_path, monkeypatch):
    """The control: one range forgotten, and a value outside it is not refused any more."""
    config = tiny(**{"optim.lr": math.nan})
    with pytest.raises(UserError, match=r"optim\.lr"):
        validate(config)
    monkeypatch.delitem(RANGES, "optim.lr")
    validate(config)


# -- P2: any words ----------------------------------------------------------------------------------------------------

GRAMMAR = st.text(st.sampled_from("[]{}(),:=~+@$\"'\\/.|*%!&#?<>- \t0123456789aexn_Ö\0\n"), max_size=14)


def test_what_all_jobs_of_a_sweep_have_in_common_is_refused_before_it_begins(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["-m", "seed=1,2", "train.max_steps=-1", "model.norm_eps=7"]) == EXIT_CONFIG
    said = capfd.readouterr().err
    assert said.count("error:") == said.count("train.max_steps=-1") == said.count("model.norm_eps=7") == 1
    assert not list(tmp_path.iterdir())


NAME = st.one_of(KEY, st.sampled_from([*groups(), "hydra/launcher", "hydra.searchpath", "model", "optim"]), GRAMMAR)
VALUE = st.one_of(
    GRAMMAR,
    st.text(max_size=10),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "true", "???", "${seed}", "[1,2", "{a:1}", "1,2", "range(1,3)", "range(1,1000000000)", "glob(*)",
         "choice(1,2)", "interval(0,1)", "shuffle(range(1,999999999))", "range(0,1,0)", "sort(2,1)", "int(3.5)",
         "extend_list(1)", "json_str(1)", "tag(a,1)", "[" * 400, "9" * 5000, "-0.0", "1e999", "'a'", "\"${x}\"", "a b"]
    ),
)  # fmt: skip
WORD = st.one_of(st.tuples(NAME, VALUE).map("=".join), st.tuples(NAME, VALUE).map("=".join), GRAMMAR)


def takes_or_refuses(words: list[str], multirun: bool) -> None:
    """Of errors only `UserError` passes."""
    with suppress(UserError):
        cli.check_overrides(words, multirun)


@settings(max_examples=50, **FUZZ)
@given(words=st.lists(WORD, max_size=4), multirun=st.booleans())
def test_any_words_are_taken_or_refused(composed_once, tmp_path, capfd, words, multirun):
    before, environment = os.listdir(tmp_path), dict(os.environ)
    takes_or_refuses(words, multirun)
    assert os.listdir(tmp_path) == before
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")
    assert torch.get_num_threads() == 1


@pytest.mark.soak
@settings(max_examples=3000, **FUZZ)
@given(words=st.lists(WORD, max_size=4), multirun=st.booleans())
def test_many_words_are_taken_or_refused(composed_once, words, multirun):
    takes_or_refuses(words, multirun)

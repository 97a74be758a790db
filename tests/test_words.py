"""Words that are no settings: what is said names the word and what was probably meant, and nothing of the parser."""

import shlex

import pytest

from normfree.words import parse, read

PARSER = ("EQUAL", "EOF", "token", "expecting", "viable", "extraneous", "mismatched", "Config'")


def problems(*words: str) -> list[str]:
    found = read(list(words), multirun=False).problems
    assert not any(leaked in line for line in found for leaked in PARSER), found
    return found


@pytest.mark.parametrize("typed", ["act = relu", "act =relu", "act= relu"])
def test_spaces_around_the_equals_sign(typed):
    assert problems("model=normfree", *typed.split(), "seed=2") == [
        f"{typed}: write act=relu, without spaces around =."
    ]


def test_what_is_put_together_is_looked_at_too():
    assert "Did you mean 'relu'?" in problems("act", "=", "rleu")[1]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed", "seed: a key without a value; write seed=VALUE."),
        ("model", "model: a key without a value; write model=VALUE (gpt2, normfree, pythia)."),
        ("model:normfree", "model:normfree: write model=normfree."),
        ("optim.lr:3", "optim.lr:3: write optim.lr=3."),
        ("model.act relu", "model.act relu: write model.act=relu."),
        ("relu", "relu: write act=relu."),
        ("act = relu", "act = relu: write act=relu, without spaces around =."),
        (" act=relu", " act=relu: write act=relu, without spaces around =."),
        ("act==relu", "act==relu: write act=relu."),
        ("=3", "=3: the key is missing; write key=3."),
        ("act=", "act=: unknown act ''."),
        ("sead", "sead: a setting is written key=value, a value with spaces in quotes. Did you mean seed=VALUE?"),
        (
            "normfre",
            "normfre: a setting is written key=value, a value with spaces in quotes. Did you mean model=n",
        ),
        ("b", "b: a setting is written key=value, a value with spaces in quotes. (All keys"),
        ("optim", "optim: a section of keys; there are: optim.lr, "),
        ("diagnostics.statistics=[1", "diagnostics.statistics=[1: a list is written [a,b]"),
        ("debug.inject={step=3}", "debug.inject={step=3}: a list is written [a,b] and several keys {key:value}"),
        ("9=[", "unknown key '9'."),
    ],
)
def test_a_word_that_is_no_setting(word, says):
    (said,) = problems(word)
    assert said.startswith(says)


@pytest.mark.parametrize("value", ["a=b", "(x", "x{y", 'say "hm', "it's", "/x (1).txt"])
def test_text_that_needs_quotes_of_its_own_is_shown_with_them(value):
    (said,) = problems(f"data.path={value}")
    shown = said.partition("in quotes of its own: ")[2]
    (override,), none = parse(shlex.split(shown))
    assert (override.key_or_group, override.value(), none) == ("data.path", value, [])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "debug.inject={stp:20,module:wte}",
            "unknown key 'debug.inject.stp'. Did you mean 'debug.inject.step'? There are",
        ),
        ("debug={inject:{stp:3}}", "unknown key 'debug.inject.stp'. Did you mean 'debug.inject.step'? There are"),
        ("debug={inject.step:3}", "debug={inject.step:...}: write debug.inject.step=VALUE, a word of its own."),
        ("debug.inject={step:x}", "debug.inject.step=x: Value 'x'"),
        ("debug.inject=3", "debug.inject=3: a section of keys; there are: debug.inject.step, debug.inject.module"),
        ("optim=null", "optim=None: a section of keys; there are: optim.lr"),
        ("optim={1:2}", "unknown key 'optim.1'."),
    ],
)
def test_a_key_inside_braces_is_looked_at_like_any_other(word, says):
    (said,) = problems(word)
    assert said.startswith(says)


def test_several_good_keys_in_braces_are_taken():
    assert problems("debug.inject={step:20,module:blocks.1.mlp.fc,phase:forward,value:inf}", "optim={lr:0.1}") == []

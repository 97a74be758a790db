"""Generation: the cache changes nothing, a seed fixes the text, and padding is never drawn."""

import math

import pytest
import torch
from tiny_run import make_run

from normfree.config import DropoutConfig, ModelConfig
from normfree.data.tokenizer import load_tokenizer
from normfree.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DIVERGED, UserError
from normfree.generate import complete, generate, main, sample
from normfree.model import Transformer, init_weights
from normfree.runs import load_run
from normfree.training.checkpoint import load_model

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 40}
FAMILIES = {
    "gpt2": {},
    "normfree": {"norm": "none"},
    "pythia": {"positions": "rotary", "rotary_pct": 0.5, "parallel_residual": True, "tie_embeddings": False},
}
PROMPT = [[1, 2, 3], [4, 5, 6]]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def build(family="gpt2", scale=8.0, **keys):
    """`scale` 8 makes confident predictions, so that a wrong position or a stale key shows in the text."""
    model = Transformer(ModelConfig(**(SHAPE | FAMILIES[family] | keys)))
    init_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt_length", [1, 3, 12, 15])
def test_cached_and_uncached_text_are_equal(family, prompt_length):
    """Across the edge of the window, too: 20 tokens more than any of these prompts pass block_size = 12."""
    model = build(family)
    prompt = torch.arange(2 * prompt_length).view(2, -1) % 40
    cached = generate(model, prompt, 20, seed=7)
    assert cached.shape == (2, prompt_length + 20)
    assert torch.equal(cached[:, :prompt_length], prompt)
    assert torch.equal(cached, generate(model, prompt, 20, seed=7, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_are_those_of_the_whole_sequence(family):
    """In pieces of any size: one token, several, all."""
    model = build(family, scale=2.0).eval()
    idx = torch.arange(24).view(2, 12)
    with torch.no_grad():
        whole = model(idx)
        for pieces in ([1] * 12, [5, 1, 6], [12]):
            cache = model.new_cache(2)
            parts = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
            assert cache.length == 12


def test_the_window_slides_at_block_size():
    model = build()
    ids = generate(model, list(range(15)), 5, temperature=0)
    for t in range(15, 20):
        assert ids[0, t] == model.eval()(ids[:, t - 12 : t])[0, -1].argmax()


def test_temperature_zero_is_the_likeliest_token_and_needs_no_seed():
    model = build()
    assert torch.equal(generate(model, PROMPT, 9, 0, seed=1), generate(model, PROMPT, 9, 0, seed=2))
    assert torch.equal(generate(model, PROMPT, 9, 0), generate(model, PROMPT, 9, 1.0, top_k=1))


def test_a_seed_fixes_the_text_and_another_changes_it():
    model = build()
    first = generate(model, PROMPT, 9, 5.0, seed=1)
    assert torch.equal(first, generate(model, PROMPT, 9, 5.0, seed=1))
    assert not torch.equal(first, generate(model, PROMPT, 9, 5.0, seed=2))


def test_frequencies_follow_temperature_and_top_k():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).repeat(40_000, 1)
    drawn = sample(logits, 2.0, 3, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn.flatten(), minlength=4) / 40_000
    expected = torch.tensor([0.5, 1.5, 1.0, -math.inf]).softmax(0)
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.01)
    assert frequency[3] == 0


def test_top_k_keeps_k_even_among_equals():
    drawn = sample(torch.zeros(1000, 8), 1.0, 3, torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1e300])
def test_extreme_temperatures_are_no_error(temperature):
    drawn = sample(torch.tensor([[0.0, 5.0, -math.inf]]), temperature, None, torch.Generator().manual_seed(0))
    assert drawn.item() in ((1,) if temperature < 1 else (0, 1))


def test_padding_is_never_drawn():
    model = build(vocab_used=5)
    ids = generate(model, [[0]] * 50, 11, temperature=1e6)
    assert set(ids[:, 1:].flatten().tolist()) == set(range(5))
    assert generate(model, [0], 5, temperature=1e6, top_k=30).max() < 5


def test_ids_that_no_token_has_are_never_drawn():
    model = build(vocab_used=30)
    ids = generate(model, [[0]] * 50, 11, temperature=1e6, n_ids=7)
    assert set(ids[:, 1:].flatten().tolist()) == set(range(7))


def test_global_randomness_and_mode_are_left_alone():
    model = build(dropout=DropoutConfig(0.5, 0.5, 0.5))
    before = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        generate(model, PROMPT, 3)
        assert model.training is mode
        assert model.blocks[0].training is mode
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError):
        generate(broken(model.train()), PROMPT, 3)
    assert model.training


def test_dropout_is_off():
    model = build(dropout=DropoutConfig(0.5, 0.5, 0.5)).train()
    assert torch.equal(generate(model, PROMPT, 9), generate(model, PROMPT, 9))


def broken(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight[0, 0] = math.nan
    return model


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error_in_words(temperature):
    with pytest.raises(UserError, match="logits are not finite") as error:
        generate(broken(build()), PROMPT, 3, temperature)
    assert error.value.exit_code == EXIT_DIVERGED


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([40], {}, "ids from 40 to 40, but the model knows 0 to 39"),
        ([-1], {}, "ids from -1"),
        ([1], {"temperature": -1}, "temperature=-1"),
        ([1], {"temperature": math.nan}, "temperature=nan"),
        ([1], {"top_k": 0}, "top_k=0"),
        ([1], {"seed": 2**64}, "seed=18446744073709551616 must be"),
        ([1], {"max_new_tokens": -2}, "tokens=-2"),
    ],
)
def test_a_bad_request_is_named(prompt, options, message):
    with pytest.raises(UserError, match=message):
        generate(build(), prompt, **({"max_new_tokens": 3} | options))


def test_no_new_tokens_give_the_prompt():
    assert generate(build(), [1, 2], 0).tolist() == [[1, 2]]


# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    torch.set_num_threads(1)
    return make_run(tmp_path_factory.mktemp("generate"))


def test_the_command_prints_prompt_and_continuation(run_dir, capsys):
    assert main([str(run_dir), "--prompt", "Text 1", "--tokens", "8", "--seed", "4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Text 1")
    model, tokenizer = load_model(run_dir), load_tokenizer(run_dir / "tokenizer")
    assert text == complete(model, tokenizer, "Text 1", 8, temperature=0.8, seed=4) + "\n"
    checkpoint = str(load_run(run_dir).checkpoints[0][1])
    assert main([checkpoint, "--prompt", "Text 1", "--tokens", "8", "--seed", "4", "--no-cache"]) == 0
    assert capsys.readouterr().out == text
    assert main([str(run_dir), "--tokens", "3"]) == 0  # no prompt: the start of a document


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], EXIT_CHECKPOINT, "neither a run directory nor a checkpoint"),
        (["RUN", "--temperature", "-1"], EXIT_CONFIG, "temperature=-1"),
        (["RUN", "--top-k", "0"], EXIT_CONFIG, "top_k=0"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(arguments, code, message, run_dir, capsys):
    assert main([word.replace("RUN", str(run_dir)) for word in arguments]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err

"""Our model and transformers' compute the same: logits, gradients, and what is written and read back."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from normfree.errors import UserError
from normfree.generate import generate
from normfree.interop.hf_config import ACT_TO_HF
from normfree.interop.hf_weights import state_from_hf
from normfree.interop.huggingface import from_hf, to_hf

LOGITS_WITHIN = 1e-5  # absolute, fp32
GRADIENTS_WITHIN = 1e-4  # of the largest element of the tensor
IDS = {"bos_token_id": None, "eos_token_id": None}

GPT2_CASES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "odd shape": {"n_embd": 35, "n_head": 5, "n_inner": 51, "vocab_size": 97, "n_positions": 19, "n_layer": 3},
    "one head, one layer, other eps": {"n_head": 1, "n_layer": 1, "layer_norm_epsilon": 1e-2},
} | {f"act {theirs}": {"activation_function": theirs} for theirs in ACT_TO_HF.values()}

NEOX_CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "sequential": {"use_parallel_residual": False},
    "sequential, tied, whole head turned": {
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "rotary_pct": 1.0,
    },
    "half of each head turned, other base": {"rotary_pct": 0.5, "rotary_emb_base": 500},
    "odd number of turned dimensions": {"hidden_size": 60, "num_attention_heads": 5, "rotary_pct": 0.25},
    "odd shape": {
        "hidden_size": 42,
        "num_attention_heads": 3,
        "intermediate_size": 61,
        "vocab_size": 89,
        "max_position_embeddings": 23,
        "rotary_pct": 0.3,
    },
    "act relu": {"hidden_act": "relu"},
}


def gpt2(**changes):
    shape = {"vocab_size": 64, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4} | changes
    return GPT2LMHeadModel(GPT2Config(**IDS, **shape))


def neox(**changes):
    shape = {
        "vocab_size": 64,
        "max_position_embeddings": 24,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    } | changes
    return GPTNeoXForCausalLM(GPTNeoXConfig(**IDS, **shape))


CASES = [pytest.param(gpt2, changes, id=f"gpt2: {name}") for name, changes in GPT2_CASES.items()] + [
    pytest.param(neox, changes, id=f"neox: {name}") for name, changes in NEOX_CASES.items()
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def randomised(theirs):
    """No tensor at its default: a bias or gain that is lost or misplaced shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


def tokens(theirs, rows=3):
    """Rows of every position that the model has."""
    length = theirs.config.max_position_embeddings
    return torch.randint(theirs.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize(("build", "changes"), CASES)
def test_imported_logits_agree(build, changes):
    theirs = randomised(build(**changes))
    idx = tokens(theirs)
    with torch.no_grad():
        assert difference(from_hf(theirs)(idx), theirs(idx).logits) < LOGITS_WITHIN


@pytest.mark.parametrize(("build", "changes"), CASES)
def test_exported_model_is_read_back_by_transformers(build, changes, tmp_path):
    theirs = randomised(build(**changes))
    ours = from_hf(theirs)
    to_hf(ours, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    idx = tokens(theirs)
    with torch.no_grad():
        assert difference(again(idx).logits, theirs(idx).logits) == 0  # weights are only moved, never computed with
        assert difference(again(idx).logits, ours(idx)) < LOGITS_WITHIN
        assert torch.equal(from_hf(tmp_path)(idx), ours(idx))


@pytest.mark.parametrize(("build", "changes"), CASES)
def test_gradients_of_one_batch_agree(build, changes):
    theirs = randomised(build(**changes))
    ours = from_hf(theirs)
    idx = tokens(theirs)
    inputs, targets = idx[:, :-1], idx[:, 1:]
    F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    loss = ours(inputs, targets)
    (loss.sum / loss.count).backward()
    # The change of layout is linear, so it maps gradients as it maps weights.
    expected = state_from_hf({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert difference(gradient, expected[name]) < GRADIENTS_WITHIN * float(expected[name].abs().max()), name


@pytest.mark.parametrize("build", [gpt2, neox])
def test_agreement_is_not_an_accident(build):
    """Negative control: with queries and keys exchanged, or one bias forgotten, logits are far from equal."""
    theirs = randomised(build())
    idx = tokens(theirs)
    with torch.no_grad():
        expected = theirs(idx).logits
        ours = from_hf(theirs)
        weight = ours.blocks[0].attn.qkv.weight
        weight.copy_(torch.cat([weight[32:64], weight[:32], weight[64:]]))
        assert difference(ours(idx), expected) > 1e-2
        ours = from_hf(theirs)
        ours.blocks[1].attn.qkv.bias_v.zero_()
        assert difference(ours(idx), expected) > 1e-2


@pytest.mark.parametrize("build", [gpt2, neox])
def test_greedy_generation_agrees(build):
    theirs = randomised(build())
    prompt = tokens(theirs, rows=2)[:, :5]
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, theirs(expected).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    for use_cache in (True, False):
        assert torch.equal(generate(from_hf(theirs), prompt, 12, temperature=0, use_cache=use_cache), expected)


def test_the_copy_is_independent():
    theirs = randomised(gpt2())
    ours = from_hf(theirs)
    back = to_hf(ours)
    before = ours(tokens(theirs))
    with torch.no_grad():
        theirs.transformer.wte.weight.zero_()
        back.transformer.h[0].mlp.c_fc.weight.zero_()
    assert torch.equal(ours(tokens(theirs)), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32(dtype):
    theirs = randomised(gpt2()).to(dtype)
    ours = from_hf(theirs)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        assert difference(ours(tokens(theirs)), theirs.float()(tokens(theirs)).logits) < LOGITS_WITHIN


def test_export_leaves_the_random_state_alone():
    ours = from_hf(gpt2())
    before = torch.get_rng_state()
    to_hf(ours)
    assert torch.equal(torch.get_rng_state(), before)


def test_cross_attention_and_frozen_scales_are_refused():
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx"):
        from_hf(gpt2(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(UserError, match="rope_parameters.*linear"):
        from_hf(neox(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}))

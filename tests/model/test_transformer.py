"""The model against a plain second implementation, and what must hold whatever the weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from normfree.config import BiasConfig, DropoutConfig, InitConfig, ModelConfig
from normfree.errors import UserError
from normfree.model import InnerAttention, Transformer, init_weights
from normfree.model.attention import Rotary
from normfree.model.losses import IGNORED

SHAPE = {"init": InitConfig(std=0.02), "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 40}
PYTHIA = {"positions": "rotary", "rotary_pct": 0.5, "parallel_residual": True, "tie_embeddings": False}
VARIANTS = {
    "gpt2": {},
    "pythia": PYTHIA,
    "sequential rotary": PYTHIA | {"parallel_residual": False},
    "parallel learned": {"parallel_residual": True},
    "normfree": {"norm": "none"},
    "placement none": {"placement": "none"},
    "no norm at all": {"norm": "none", "final_norm": "none"},
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm, layernorm last": {"norm": "rmsnorm", "final_norm": "layernorm"},
    "wide, scaled": {"n_inner": 50, "embed_scale": 3.0, "act_beta": 2.0, "norm_eps": 0.1},
    "padded": {"vocab_used": 33},
    "biases of q and k only": {"bias": BiasConfig(True, False, False, False, False)},
    "biases of v only": {"bias": BiasConfig(False, True, False, False, False)},
}
EACH_VARIANT = pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)


def build(scale=3.0, **keys):
    """Every tensor away from its initial value."""
    model = Transformer(ModelConfig(**(SHAPE | keys)))
    init_weights(model, seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(rows=3, T=12, vocabulary=33):
    return torch.randint(vocabulary, (rows, T), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- a second implementation


def reference(model, idx):
    """Logits in float64 by loops over heads and positions, from the state dict alone."""
    c = model.config
    w = {name: t.double() for name, t in model.state_dict().items()}
    x = w["wte.weight"][idx]
    if c.positions == "learned":
        x = x + w["wpe.weight"][: idx.size(1)]
    x = c.embed_scale * x
    block_norm = "none" if c.placement == "none" else c.norm
    for i in range(c.n_layer):
        own = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        attended = reference_attention(c, own, reference_norm(c, own, block_norm, "norm_1", x))
        if c.parallel_residual:
            x = x + attended + reference_mlp(c, own, reference_norm(c, own, block_norm, "norm_2", x))
        else:
            x = x + attended
            x = x + reference_mlp(c, own, reference_norm(c, own, block_norm, "norm_2", x))
    x = reference_norm(c, w, c.final_norm, "final_norm", x)
    logits = x @ w["wte.weight" if c.tie_embeddings else "lm_head.weight"].T
    logits[..., model.vocab_used :] = -math.inf
    return logits


def reference_norm(c, w, kind, name, x):
    if kind == "none":
        return x
    if kind == "rmsnorm":
        return w[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return (
        w[f"{name}.weight"] * centred / (centred.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() + w[f"{name}.bias"]
    )


def reference_linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def reference_mlp(c, w, x):
    h = c.act_beta * reference_linear(w, "mlp.fc", x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / c.act_beta
    return reference_linear(w, "mlp.proj", h)


def reference_attention(c, w, x):
    C, D = c.n_embd, c.head_dim
    weight = w["attn.qkv.weight"]
    bias = torch.cat(
        (w.get("attn.qkv.bias_qk", weight.new_zeros(2 * C)), w.get("attn.qkv.bias_v", weight.new_zeros(C)))
    )
    qkv = x @ weight.T + bias
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for h in range(c.n_head):
            q, k, v = (qkv[b, :, part * C + h * D : part * C + (h + 1) * D] for part in range(3))
            if c.positions == "rotary":
                q, k = reference_rotary(c, q), reference_rotary(c, k)
            for t in range(x.size(1)):
                p = (k[: t + 1] @ q[t] / math.sqrt(D)).softmax(0)
                out[b, t, h * D : (h + 1) * D] = p @ v[: t + 1]
    return reference_linear(w, "attn.proj", out)


def reference_rotary(c, x):
    """Dimensions i and i + r/2 are a complex number, turned by position * base^(-2i/r)."""
    r = c.rotary_dim
    angle = torch.arange(len(x)).double()[:, None] * c.rotary_base ** (-torch.arange(0, r, 2).double() / r)
    turned = torch.complex(x[:, : r // 2], x[:, r // 2 : r]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag, x[:, r:]), dim=1)


@EACH_VARIANT
def test_logits_are_those_of_a_second_implementation(keys):
    model = build(**keys)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).double(), reference(model, tokens()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- invariants


@EACH_VARIANT
def test_a_token_changes_no_logit_before_it(keys):
    model, idx = build(**keys), tokens(rows=1)
    with torch.no_grad():
        before = model(idx)
        for t in range(12):
            changed = idx.clone()
            changed[0, t] = (changed[0, t] + 1) % 33
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            for later in range(t, 12):
                assert not torch.equal(after[:, later], before[:, later])


@EACH_VARIANT
def test_sequences_of_a_batch_do_not_see_each_other(keys):
    model, idx = build(**keys), tokens()
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in idx])
        torch.testing.assert_close(model(idx), alone, rtol=1e-5, atol=1e-5)


def test_block_size_is_the_end():
    model = build()
    with pytest.raises(AssertionError, match="13 positions, but block_size is 12"):
        model(tokens(T=13))
    cache = model.new_cache(3)
    model(tokens(T=10), cache=cache)
    with pytest.raises(AssertionError, match="13 positions"):
        model(tokens(T=3), cache=cache)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model\.vocab_size is null"):
        Transformer(ModelConfig())


@pytest.mark.parametrize("keys", [{"norm": "none"}, {"placement": "none"}])
def test_absent_norms_are_identities_and_the_last_one_stays(keys):
    model = build(**keys)
    for block in model.blocks:
        assert isinstance(block.norm_1, torch.nn.Identity)
        assert isinstance(block.norm_2, torch.nn.Identity)
    assert type(model.final_norm).__name__ == "LayerNorm"


# ------------------------------------------------------------------------------------------------- loss and vocabulary


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model, idx, targets = build(), tokens(), tokens().roll(1, dims=0)
    loss = model(idx, targets)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum, expected)
    assert loss.count == 36
    targets[0, :5] = IGNORED
    partial = model(idx, targets)
    kept = F.cross_entropy(model(idx).flatten(0, 1)[5:], targets.flatten()[5:], reduction="sum")
    torch.testing.assert_close(partial.sum, kept)
    assert partial.count == 31


@pytest.mark.parametrize("keys", [{}, PYTHIA])
def test_padding_of_the_vocabulary_takes_no_probability_and_no_loss(keys):
    padded, exact = build(**keys, vocab_used=33), build(**(keys | {"vocab_size": 33}))
    state = padded.state_dict()
    cut = {n: t[:33] if n in ("wte.weight", "lm_head.weight") else t for n, t in state.items()}
    exact.load_state_dict(cut)
    idx = tokens()
    probabilities = padded(idx).softmax(-1)
    assert (probabilities[..., 33:] == 0).all()
    torch.testing.assert_close(probabilities[..., :33], exact(idx).softmax(-1))
    loss = padded(idx, idx).sum
    torch.testing.assert_close(loss, exact(idx, idx).sum)
    loss.backward()
    assert (padded.head_weight.grad[33:] == 0).all()
    torch.testing.assert_close(
        padded.head_weight.grad[:33], torch.autograd.grad(exact(idx, idx).sum, exact.head_weight)[0]
    )


def test_embed_scale_is_on_the_embedding_and_not_on_a_tied_head():
    model = build(norm="none", final_norm="none", embed_scale=5.0)
    with torch.no_grad():
        for block in model.blocks:
            for proj in (block.attn.proj, block.mlp.proj):
                proj.weight.zero_()
                proj.bias.zero_()
        embedding = model.wte.weight[tokens()] + model.wpe.weight
        torch.testing.assert_close(model(tokens()), 5 * embedding @ model.wte.weight.T)


# ---------------------------------------------------------------------------------------------------- biases, dropout


BIASES = {
    "qk": {"attn.qkv.bias_qk"},
    "v": {"attn.qkv.bias_v"},
    "attn_proj": {"attn.proj.bias"},
    "mlp_fc": {"mlp.fc.bias"},
    "mlp_proj": {"mlp.proj.bias"},
}


@pytest.mark.parametrize("kind", BIASES)
def test_each_kind_of_bias_is_there_or_not_and_zero_is_the_same_as_not(kind):
    full, less = build(), build(bias=BiasConfig(**{kind: False}))
    lost = {name for name, _ in full.named_parameters()} - {name for name, _ in less.named_parameters()}
    gone = {f"blocks.{i}.{name}" for i in range(2) for name in BIASES[kind]}
    assert lost == gone
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if name in gone:
                parameter.zero_()
        less.load_state_dict({name: t for name, t in full.state_dict().items() if name not in gone})
        assert torch.equal(full(tokens()), less(tokens()))


@pytest.mark.parametrize("kind", ["embed", "attn", "resid"])
@pytest.mark.parametrize("family", [{}, PYTHIA])
def test_dropout_acts_in_training_only(kind, family):
    plain, model = build(**family), build(**family, dropout=DropoutConfig(**{kind: 0.5}))
    with torch.no_grad():
        expected = plain(tokens())
        assert torch.equal(model(tokens()), expected)
        model.train()
        first, second = model(tokens()), model(tokens())
        assert not torch.equal(first, second)
        assert not torch.allclose(first, expected)


def test_without_dropout_training_mode_changes_nothing():
    model = build()
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()), model.train()(tokens()))


# ------------------------------------------------------------------------------------------------ attention and rotary


def test_inner_attention_is_causal_softmax_at_every_offset():
    """Queries are the last rows of a longer sequence: the same outputs as when all of them are asked for."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, 12, 8, generator=generator).unbind(0)
    inner = InnerAttention(ModelConfig(**SHAPE)).eval()
    assert inner.scale == 8**-0.5
    whole = inner(q, k, v)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
    torch.testing.assert_close(whole, scores.softmax(-1) @ v)
    for offset in range(12):
        part = inner(q[:, :, offset:], k, v, q_offset=offset)
        torch.testing.assert_close(part, whole[:, :, offset:], rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="2 queries from position 3, but 12 keys"):
        inner(q[:, :, :2], k, v, q_offset=3)


@pytest.mark.parametrize("T", [*range(1, 18), 64])
def test_attention_never_makes_a_number_of_nan(T):
    """PyTorch's CPU kernel made zeros of a NaN row with fewer keys than a vector register holds, 8 or 16."""
    q, k, v = torch.randn(3, 1, 2, T, 8, generator=torch.Generator().manual_seed(T)).unbind(0)
    inner = InnerAttention(ModelConfig(**SHAPE)).eval()
    bad = q.clone()
    bad[0, 0, :, 0] = math.nan
    assert inner(bad, k, v)[0, 0].isnan().all()
    assert inner(bad, k, v)[0, 1].isfinite().all()
    assert inner(bad[:, :, -1:], k, v, q_offset=T - 1)[0, 0].isnan().all()
    bad = k.clone()
    bad[0, 0, T // 2, 0] = math.nan
    sees = torch.arange(T) >= T // 2
    assert torch.equal(inner(q, bad, v)[0, 0].isnan().any(-1), sees)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_rotary_scores_depend_on_the_distance_alone(share):
    config = ModelConfig(**(SHAPE | {"block_size": 40}), positions="rotary", rotary_pct=share)
    rotary = Rotary(config)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(2)).unbind(0)
    packed = torch.stack((q, k, k)).view(1, 1, 3, 1, -1)
    turned_q, turned_k, value = rotary(packed.expand(1, 40, 3, 1, -1), 0)[0, :, :, 0].unbind(1)  # (40, D) each
    scores = turned_q @ turned_k.T
    for distance in range(40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[:, 0].std() > 1e-3  # and on the distance they do depend
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(40))
    assert torch.equal(turned_q[0], q)
    assert torch.equal(turned_q[:, config.rotary_dim :], q[config.rotary_dim :].expand(40, -1))
    assert torch.equal(value, k.expand(40, -1))
    assert torch.equal(rotary(packed, 17)[0, 0, 0, 0], turned_q[17])


def test_rotary_leaves_no_tensor_in_a_checkpoint():
    assert not [name for name in build(**PYTHIA).state_dict() if "rotary" in name]


@pytest.mark.parametrize("keys", [{}, PYTHIA, {"norm": "rmsnorm"}])
def test_bf16_autocast_is_near_fp32(keys):
    model = build(scale=1.0, **keys)
    with torch.no_grad():
        exact = model(tokens())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(tokens())
            loss = model(tokens(), tokens())
    assert loss.sum.dtype == torch.float32
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()

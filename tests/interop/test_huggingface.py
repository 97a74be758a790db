"""Folders and settings, without transformers: what is read, and what is refused by name."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from normfree.config import BiasConfig, DropoutConfig, ModelConfig, resolve_model
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.interop.hf_config import config_from_hf, config_to_hf
from normfree.interop.hf_weights import state_to_hf
from normfree.interop.huggingface import from_hf, to_hf
from normfree.model import Transformer, init_weights

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 10, "vocab_size": 20}
NEOX = GPT2 | {"positions": "rotary", "rotary_pct": 0.5, "parallel_residual": True, "tie_embeddings": False}
FAMILIES = pytest.mark.parametrize("shape", [GPT2, NEOX], ids=["gpt2", "neox"])


def build(**keys):
    model = Transformer(ModelConfig(**keys))
    init_weights(model, seed=1)
    return model.eval()


def write(folder, model, **changes):
    """A Hugging Face folder of `model`; returns its tensors, for tests that write them otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config) | changes))
    tensors = {name: t.clone() for name, t in state_to_hf(model).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None])


@FAMILIES
def test_a_folder_gives_the_model_back(shape, tmp_path):
    model = build(**shape)
    write(tmp_path / "hf", model)
    assert torch.equal(logits(from_hf(tmp_path / "hf")), logits(model))


@FAMILIES
def test_configurations_go_round(shape):
    config = resolve_model(
        ModelConfig(**shape, vocab_used=20, norm_eps=1e-3, act="silu", dropout=DropoutConfig(0.1, 0.2, 0.1))
    )
    assert config_from_hf(config_to_hf(config)) == config


@FAMILIES
def test_names_of_old_files_are_understood(shape, tmp_path):
    """GPT-2's own file has no prefix and holds its causal masks; Pythia's has masks, frequencies and `embed_out`."""
    model = build(**shape)
    tensors = write(tmp_path, model)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 10, 10) for i in range(2)}
    if shape is GPT2:
        old = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
        old |= masks
    else:
        old = tensors | {"embed_out.weight": tensors["lm_head.weight"].clone()}
        del old["lm_head.weight"]
        for i in range(2):
            prefix = f"gpt_neox.layers.{i}.attention"
            old |= {f"{prefix}.bias": torch.ones(1, 1, 10, 10), f"{prefix}.masked_bias": torch.tensor(-1e9)}
            old |= {f"{prefix}.rotary_emb.inv_freq": torch.ones(2)}
    save_file(old, tmp_path / "model.safetensors")
    assert torch.equal(logits(from_hf(tmp_path)), logits(model))


def test_rotary_keys_before_and_since_transformers_5_mean_the_same():
    old = config_to_hf(ModelConfig(**(NEOX | {"rotary_base": 500.0})))
    new = {name: value for name, value in old.items() if not name.startswith("rotary")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(new).rotary_base == 500.0


def test_shards_are_put_together(tmp_path):
    model = build(**GPT2)
    tensors = write(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(from_hf(tmp_path)), logits(model))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    with pytest.raises(UserError, match="elsewhere.*not in the folder"):
        from_hf(tmp_path)


def damage_pickle(folder, tensors):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_truncate(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_missing(folder, tensors):
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, folder / "model.safetensors")


def damage_surplus(folder, tensors):
    save_file(tensors | {"transformer.h.0.crossattention.c_attn.weight": torch.ones(2)}, folder / "model.safetensors")


def damage_shape(folder, tensors):
    save_file(tensors | {"transformer.wpe.weight": torch.ones(11, 12)}, folder / "model.safetensors")


def damage_head(folder, tensors):
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "model.safetensors")


def damage_index(folder, tensors):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def damage_config(folder, tensors):
    (folder / "config.json").write_text('{"model_type": "gpt2",')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_pickle, r"pytorch_model\.bin is a pickle, which runs code"),
        (damage_truncate, "cannot be read"),
        (damage_missing, r"lacks transformer\.h\.1\.mlp\.c_fc\.bias"),
        (damage_surplus, r"has transformer\.h\.0\.crossattention"),
        (damage_shape, r"wpe\.weight is \(11, 12\), not \(10, 12\)"),
        (damage_head, "tie_word_embeddings is true, but lm_head"),
        (damage_config, "not JSON"),
        (damage_index, r"index\.json has no weight_map"),
    ],
)
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    tensors = write(tmp_path, build(**GPT2))
    damage(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as error:
        from_hf(tmp_path)
    assert error.value.exit_code == EXIT_CHECKPOINT


def test_an_untied_configuration_needs_a_head(tmp_path):
    tensors = write(tmp_path, build(**GPT2), tie_word_embeddings=False)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (GPT2, {"model_type": "llama"}, "unknown model_type 'llama'"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "mish"}, "activation_function: unknown activation 'mish'"),
        (GPT2, {"activation_function": ["relu"]}, "activation_function: unknown activation"),
        (GPT2, {"model_type": ["gpt2"]}, "unknown model_type"),
        (GPT2, {"n_head": 0}, "n_head=0 must be a whole number of at least 1"),
        (GPT2, {"n_layer": "2"}, "n_layer='2' must be a whole number"),
        (GPT2, {"n_head": 5}, "n_embd=12 is no multiple of n_head=5"),
        (NEOX, {"rope_scaling": [1]}, r"rope_scaling=\[1\] is no object"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (GPT2, {"n_layer": None}, "lacks n_layer"),
        (NEOX, {"attention_bias": False}, "attention_bias=False"),
        (NEOX, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*'linear'"),
        (NEOX, {"rotary_pct": 0.0}, "rotary_pct=0.0 turns none"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused_by_name(shape, changes, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(config_to_hf(ModelConfig(**shape)) | changes)


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        (GPT2, {"norm": "none"}),
        (GPT2, {"norm": "rmsnorm"}),
        (GPT2, {"final_norm": "none"}),
        (GPT2, {"placement": "none"}),
        (GPT2, {"act": "learnable_leaky_relu"}),
        (GPT2, {"act": "leaky_relu", "act_slope": 0.1}),
        (GPT2, {"act_beta": 2.0}),
        (GPT2, {"embed_scale": 3.0}),
        (GPT2, {"parallel_residual": True}),
        (NEOX, {"norm": "none"}),
        (NEOX, {"dropout": DropoutConfig(embed=0.1)}),
    ],
)
def test_keys_that_no_stock_class_has_are_refused_by_name(shape, keys):
    model = build(**(shape | keys))
    with pytest.raises(UserError) as error:
        to_hf(model)
    for name in keys:
        assert f"model.{name}" in str(error.value)


@FAMILIES
def test_all_that_is_wrong_is_said_at_once(shape):
    with pytest.raises(UserError, match=r"(?s)model\.norm=none.*model\.act_beta=2.0.*model\.embed_scale=3.0"):
        config_to_hf(ModelConfig(**shape, norm="none", act_beta=2.0, embed_scale=3.0))


@FAMILIES
def test_absent_biases_are_exported_as_zeros_and_change_nothing(shape, tmp_path):
    model = build(**shape, bias=BiasConfig(qk=True, v=False, attn_proj=False, mlp_fc=False, mlp_proj=False))
    torch.nn.init.normal_(model.blocks[0].attn.qkv.bias_qk)
    write(tmp_path, model)
    again = from_hf(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not again.blocks[1].mlp.fc.bias.any()


@FAMILIES
def test_rows_that_pad_the_vocabulary_are_left_out(shape, tmp_path):
    model = build(**(shape | {"vocab_used": 17}))
    write(tmp_path, model)
    again = from_hf(tmp_path)
    assert again.config.vocab_size == 17
    assert torch.allclose(logits(again), logits(model)[..., :17], atol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 17


def test_reading_a_folder_needs_no_transformers(tmp_path):
    write(tmp_path, build(**GPT2))
    code = (
        "import sys; from normfree.interop.huggingface import from_hf; "
        f"from_hf({str(tmp_path)!r}); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        to_hf(build(**GPT2))

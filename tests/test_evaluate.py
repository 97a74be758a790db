"""Evaluation: its numbers are those of the plain definitions, and its directory is a run that figures can read."""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_run import STEP, make_run, write_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from normfree import measure
from normfree.config import BiasConfig, DropoutConfig, ModelConfig
from normfree.data.batches import evaluation_rows
from normfree.data.packing import prepare
from normfree.data.tokenizer import load_tokenizer
from normfree.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DIRECTORY
from normfree.evaluate import main
from normfree.interop.hf_config import config_to_hf
from normfree.interop.hf_weights import state_to_hf
from normfree.measure import measure_split
from normfree.model import Transformer, init_weights
from normfree.model.losses import IGNORED
from normfree.runs import SITES, load_run
from normfree.training import store
from normfree.training.checkpoint import load_model
from normfree.training.evaluation import bytes_per_token

PYTHIA = {"positions": "rotary", "parallel_residual": True, "tie_embeddings": False, "rotary_pct": 0.5}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def build(**keys):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 20, "vocab_size": 30} | keys
    model = Transformer(ModelConfig(**shape))
    init_weights(model, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def rows(n=7, T=12, vocabulary=30):
    return np.random.default_rng(0).integers(0, vocabulary, (n, T + 1))


def softmax_entropies(model, idx):
    """(n_layer, N, H, T) by materialised probabilities in float64, from the same queries and keys."""
    found = []

    def hook(module, args, kwargs, output):
        q, k = args[0].double(), args[1].double()
        scores = q @ k.transpose(-1, -2) * module.scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(future, -math.inf).softmax(-1)
        found.append(torch.special.entr(p).sum(-1))

    handles = [b.attn.inner_attention.register_forward_hook(hook, with_kwargs=True) for b in model.blocks]
    with torch.no_grad():
        model.eval()(idx)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("family", [{}, PYTHIA, {"norm": "none", "vocab_used": 25}])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_numbers_are_those_of_the_definitions(family, batch_size, monkeypatch):
    monkeypatch.setattr(measure, "LOGIT_ELEMENTS", 2 * 12 * 30)  # logits of two rows at a time
    model = build(**family)
    data = rows(vocabulary=25)
    idx, targets = torch.from_numpy(data[:, :-1]), torch.from_numpy(data[:, 1:])
    result = measure_split(model, data, batch_size)
    with torch.no_grad():
        logits = model.eval()(idx)
        expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        whole = model(idx, targets)
    np.testing.assert_allclose(result.position_loss, expected.mean(0), rtol=1e-5)
    assert result.loss == pytest.approx(float(whole.sum / whole.count), rel=1e-6)
    assert (result.sequences, result.tokens) == (7, 84)
    entropies = softmax_entropies(model, idx)
    np.testing.assert_allclose(result.position_entropy, entropies.mean(1), atol=2e-5)
    np.testing.assert_allclose(result.entropy, entropies.mean((1, 3)), atol=1e-5)
    assert result.position_entropy.shape == (2, 2, 12)
    assert not result.counts["nan_count"].any()


def test_ignored_targets_take_no_part():
    model, data = build(), rows()
    full = measure_split(model, data)
    data[:, -1] = IGNORED
    cut = measure_split(model, data)
    assert np.isnan(cut.position_loss[-1])
    np.testing.assert_array_equal(cut.position_loss[:-1], full.position_loss[:-1])
    assert cut.loss == pytest.approx(float(full.position_loss[:-1].mean()), rel=1e-6)
    assert cut.tokens == 7 * 11


def test_nan_stays_nan_and_is_counted():
    model = build()
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias_qk[0] = math.nan  # first dimension of the first head's queries
    result = measure_split(model, rows())
    assert np.isnan(result.position_entropy[1, 0]).all()
    assert np.isfinite(result.position_entropy[0]).all()
    assert np.isfinite(result.position_entropy[1, 1]).all()
    block = result.counts["nan_count"][SITES.index("block")]
    assert block.tolist() == [0, 7 * 12 * 16]
    assert math.isnan(result.loss)


def test_the_model_is_left_as_it_was():
    model = build(dropout=DropoutConfig(0.5, 0.5, 0.5)).train()
    first = measure_split(model, rows())
    assert first.loss == measure_split(model, rows()).loss  # no dropout
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    torch.set_num_threads(1)
    return make_run(tmp_path_factory.mktemp("evaluate"))


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and "evaluations" not in p.parts}


def test_a_run_is_evaluated_into_a_run_of_its_own(run_dir, capsys):
    before = contents(run_dir)
    assert main([str(run_dir)]) == 0
    assert contents(run_dir) == before
    out = run_dir / "evaluations" / f"step-{STEP:08d}"
    assert str(out) in capsys.readouterr().out
    evaluation, source = load_run(out), load_run(run_dir)

    corpus = prepare(source.config.data)
    tokens = corpus.tokens("val")
    data = evaluation_rows(tokens, 24, len(tokens))
    assert data[:, 1:].size > len(tokens) - 2 * 24  # the whole split, but for a last block that is not whole
    expected = measure_split(load_model(run_dir), data)
    row = evaluation.metrics.iloc[0]
    assert row["step"] == STEP
    assert row["val/loss"] == expected.loss
    assert row["val/perplexity"] == pytest.approx(math.exp(expected.loss))
    bits = expected.loss / math.log(2) / corpus.bytes_per_token("val")
    assert row["val/bits_per_byte"] == pytest.approx(bits)
    for name, value in (
        ("position_loss", expected.position_loss),
        ("position_entropy", expected.position_entropy),
        ("probe_attn_entropy", expected.entropy),
        ("probe_nan_count", expected.counts["nan_count"]),
    ):
        steps, values = evaluation.array(name)
        assert steps.tolist() == [STEP]
        np.testing.assert_array_equal(values[0], value)
    assert evaluation.info("position_entropy").axes == ("layer", "head", "position")
    assert evaluation.status["status"] == "finished"
    assert evaluation.status["tokens"] == data[:, 1:].size
    assert evaluation.config.data == source.config.data
    assert evaluation.name == f"tiny step {STEP}"


def test_bits_per_byte_of_a_part_are_of_that_part(run_dir, tmp_path):
    """The first documents are other text than the whole split: training, which evaluates the same, says the same."""
    config = load_run(run_dir).config
    tokens = 48
    out = tmp_path / "part"
    assert main([str(run_dir), "--max-tokens", str(tokens), "--out", str(out)]) == 0
    row, corpus = load_run(out).metrics.iloc[0], prepare(config.data)
    rows = evaluation_rows(corpus.tokens("val"), 24, tokens)
    expected = row["val/loss"] / math.log(2) / bytes_per_token(rows, corpus.tokenizer)
    assert row["val/bits_per_byte"] == pytest.approx(expected, rel=1e-9)
    assert bytes_per_token(rows, corpus.tokenizer) != pytest.approx(corpus.bytes_per_token("val"), rel=1e-4)


def test_a_run_is_measured_on_other_text_with_its_own_tokenizer(train_tiny, tmp_path, capsys):
    """A tokenizer that was trained would be another one on other text, and one may have been moved."""
    texts = write_texts(tmp_path / "other")
    for name in ("trained", str(tmp_path / "tokenizer.json")):
        byte_level().save(str(tmp_path / "tokenizer.json"))
        run = train_tiny(f"run-{Path(name).stem}", **{"data.tokenizer": name, "data.vocab_size": 300})
        (tmp_path / "tokenizer.json").unlink()
        assert main([str(run.directory), "--path", str(texts), "--out", str(tmp_path / "ev")]) == 0, name
        own = load_tokenizer(run.directory / "tokenizer").fingerprint
        assert prepare(load_run(tmp_path / "ev").config.data).tokenizer.fingerprint == own


def test_an_evaluation_gives_way_to_the_same_question_alone(run_dir, tmp_path, capsys):
    """Another text or length under the same default name used to take the place of what was there."""
    out, texts = run_dir / "evaluations" / f"step-{STEP:08d}", write_texts(tmp_path / "other")
    command = [str(run_dir)]
    assert main(command) == 0
    first = (out / "metrics.jsonl").read_bytes()
    assert main(command) == 0
    assert main([str(run_dir / "checkpoints" / f"step-{STEP:08d}")]) == 0  # the same by its name
    for more in (["--path", str(texts)], ["--seq-len", "12"], ["--max-tokens", "48"]):
        assert main(command + more) == EXIT_DIRECTORY
        assert f"{out} is another evaluation ({more[0][2:].replace('-', '_')}: None" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == first
    (tmp_path / "link").symlink_to(out)
    assert main([*command, "--out", str(tmp_path / "link")]) == EXIT_DIRECTORY
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other"]


def test_nothing_is_trained_in_an_evaluation(run_dir, tmp_path, capsys, monkeypatch):
    from normfree import cli

    monkeypatch.setattr(sys, "argv", ["run.py"])
    out = tmp_path / "ev"
    assert main([str(run_dir), "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for words, code in (
        (["resume=" + str(out)], EXIT_DIRECTORY),
        (["resume=" + str(out), "train.max_steps=99"], EXIT_DIRECTORY),
        (["init_from=" + str(out)], EXIT_CHECKPOINT),
    ):
        assert cli.main(words) == code
        assert "is an evaluation" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_figures_can_be_drawn_of_it(run_dir, tmp_path):
    from plotting import entropy_heatmap

    out = tmp_path / "evaluation"
    assert main([str(run_dir), "--out", str(out)]) == 0
    assert entropy_heatmap.main([str(out)]) == 0
    assert (out / "figures" / "entropy_heatmap.png").is_file()


def test_a_checkpoint_by_name_and_again_replaces_the_older_evaluation(run_dir, tmp_path):
    out = tmp_path / "evaluation"
    checkpoint = str(run_dir / "checkpoints" / f"step-{STEP:08d}")
    assert main([checkpoint, "--out", str(out), "--seq-len", "8", "--max-tokens", "100"]) == 0
    assert load_run(out).array("position_loss")[1].shape == (1, 8)
    assert load_run(out).status["tokens"] == 96
    assert main([checkpoint, "--out", str(out)]) == 0
    assert load_run(out).array("position_loss")[1].shape == (1, 24)
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation"]


def test_another_split_and_other_text_have_their_own_names(run_dir, tmp_path):
    assert main([str(run_dir), "--split", "train", "--max-tokens", "100"]) == 0
    evaluation = load_run(run_dir / "evaluations" / f"step-{STEP:08d}-train")
    assert "train/loss" in evaluation.metrics
    assert "val/loss" not in evaluation.metrics
    assert evaluation.name == f"tiny step {STEP} (train)"
    texts = write_texts(tmp_path / "texts")
    (texts / "more.txt").write_text("Some more of another kind. " * 20)
    assert main([str(run_dir), "--path", str(texts), "--out", str(tmp_path / "other")]) == 0
    other = load_run(tmp_path / "other").config.data
    assert other.path == str(texts)
    assert other.fingerprint != load_run(run_dir).config.data.fingerprint


def test_a_diverged_checkpoint_is_written_down_as_such(tmp_path):
    run_dir = make_run(tmp_path, bias=BiasConfig())
    path = run_dir / "checkpoints" / f"step-{STEP:08d}"
    model = load_model(run_dir)
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight[0, 0] = math.nan
    save_file({name: p.detach() for name, p in model.named_parameters()}, path / "model.safetensors")
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in store.FILES}
    (path / "MANIFEST.json").write_bytes(store.manifest(STEP, digests))
    assert main([str(path)]) == 0
    evaluation = load_run(run_dir / "evaluations" / path.name)
    assert math.isnan(evaluation.metrics["val/loss"][0])
    assert np.isfinite(evaluation.probe_entropy[0, 0]).all()
    assert np.isnan(evaluation.probe_entropy[0, 1]).all()


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def hf_folder(folder, **keys):
    """A GPT-2 with a byte-level tokenizer.json."""
    model = build(**({"block_size": 40, "vocab_size": 257} | keys))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    save_file({name: t.clone() for name, t in state_to_hf(model).items()}, folder / "model.safetensors")
    byte_level().save(str(folder / "tokenizer.json"))
    return model


def test_a_hugging_face_folder_is_evaluated_with_its_own_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = hf_folder(tmp_path / "mine")
    texts = write_texts(tmp_path / "texts")
    assert main(["mine", "--path", str(texts), "--seq-len", "40"]) == 0
    evaluation = load_run("runs/evaluate-mine")
    corpus = prepare(evaluation.config.data)
    assert corpus.tokenizer.kind == "json"
    data = evaluation_rows(corpus.tokens("val"), 40, len(corpus.tokens("val")))
    assert evaluation.metrics["val/loss"][0] == pytest.approx(measure_split(model, data).loss, rel=1e-6)
    assert evaluation.array("position_entropy")[1].shape == (1, 2, 2, 40)
    assert evaluation.status["last_step"] == 0
    assert (evaluation.name, evaluation.config.model.vocab_size) == ("mine", 257)


def test_a_folder_without_a_tokenizer_and_a_vocabulary_too_small_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = str(write_texts(tmp_path / "texts"))
    hf_folder(tmp_path / "small", vocab_size=100)
    assert main(["small", "--path", texts]) == EXIT_CONFIG
    assert "257 ids" in capsys.readouterr().err
    (tmp_path / "small" / "tokenizer.json").unlink()
    assert main(["small", "--path", texts]) == EXIT_CONFIG
    assert "no tokenizer.json; name one with --tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], EXIT_CHECKPOINT, "neither a run directory, nor a checkpoint, nor a Hugging Face folder"),
        (["RUN", "--out", "RUN"], EXIT_DIRECTORY, "is no evaluation"),
        (["RUN", "--tokenizer", "gpt2"], EXIT_CONFIG, "--tokenizer is for a Hugging Face folder"),
        (["RUN", "--seq-len", "33"], EXIT_CONFIG, "data.seq_len=33 is longer than model.block_size=32"),
        (["RUN", "--data", "fils"], EXIT_CONFIG, "Did you mean 'files'?"),
        (["RUN", "--batch-size", "0"], EXIT_CONFIG, "--batch-size 0"),
        (["RUN", "--max-tokens", "-3"], EXIT_CONFIG, "--max-tokens -3"),
        (["RUN", "--plugin", "nothing.py"], EXIT_CONFIG, "nothing.py: there is no such file"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(arguments, code, message, run_dir, capsys):
    before = contents(run_dir)
    assert main([word.replace("RUN", str(run_dir)) for word in arguments]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert contents(run_dir) == before

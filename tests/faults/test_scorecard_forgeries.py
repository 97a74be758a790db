"""Checkpoints, runs and data sets made by somebody else: what is in them is looked at, and none of it is run."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from canary import Payload
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from normfree import cli
from normfree.config import DataConfig
from normfree.data.packing import prepare
from normfree.data.sources import CodeParrot
from normfree.errors import EXIT_CHECKPOINT, EXIT_DATA, UserError
from normfree.runs import MANIFEST, load_run
from normfree.training import checkpoint as ckpt
from normfree.training import store


@pytest.fixture
def canary(tmp_path):
    """The folder that code would make."""
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_run.make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run_dir(made, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_plugins", {})
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def forge(run_dir: Path, name: str, content: bytes) -> Path:
    """Put `content` in the run's only checkpoint, with a manifest that agrees: a forger can count hashes, too."""
    ((step, path),) = load_run(run_dir).checkpoints
    (path / name).write_bytes(content)
    digests = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in store.FILES}
    (path / MANIFEST).write_bytes(store.manifest(step, digests))
    return path


def raw(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def zipped(canary: Path) -> bytes:
    path = canary.with_name("zipped")
    torch.save({"wte.weight": Payload(canary)}, path)
    return path.read_bytes()


NESTED = b'{"a":' * 50_000
MODEL, OPTIMIZER, CONFIG, STATE = store.FILES[0], store.FILES[1], "config.yaml", "state.json"
FORGED = {
    "a pickle for weights": (MODEL, raw),
    "a zipped pickle for weights": (MODEL, zipped),
    "a header of 2^63 bytes": (MODEL, lambda _: b"\xff" * 7 + b"\x7f"),
    "a header of 2^40 bytes": (MODEL, lambda _: (1 << 40).to_bytes(8, "little") + b"{}"),
    "a deep header": (MODEL, lambda _: len(NESTED).to_bytes(8, "little") + NESTED),
    "other types": (MODEL, lambda _: to_bytes({"wte.weight": torch.zeros(320, 16, dtype=torch.int8)})),
    "a tag": (CONFIG, lambda canary: f"model: !!python/object/apply:os.mkdir ['{canary}']".encode()),
    "a target": (CONFIG, lambda canary: f"model: {{_target_: os.mkdir, path: '{canary}'}}".encode()),
    "a list for settings": (CONFIG, lambda _: b"[1]"),
    "settings of other types": (CONFIG, lambda _: b"model: {n_layer: [1], act: {_target_: os.mkdir}}"),
    "10^9 layers": (CONFIG, lambda _: b"model: {n_layer: 1000000000}"),
    "9999 layers": (CONFIG, lambda _: b"model: {n_layer: 9999, vocab_size: 320}"),
    "terabytes": (CONFIG, lambda _: b"model: {n_layer: 2, n_head: 1, n_embd: 1000000, vocab_size: 1000000}"),
    "no UTF-8": (CONFIG, lambda _: b"\xff\xfe"),
    "deep settings": (CONFIG, lambda _: b"[" * 1100),
    "no state": (STATE, lambda _: b"[]"),
    "a deep state": (STATE, lambda _: b"[" * 100_000),
    "a step that is none": (STATE, lambda _: b'{"step": "30", "finite": true}'),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_refused(run_dir, canary, name):
    file, content = FORGED[name]
    path = forge(run_dir, file, content(canary))
    for named in (path, run_dir):
        with pytest.raises(UserError) as caught:
            ckpt.load_model(named)
        assert caught.value.exit_code == EXIT_CHECKPOINT
    assert not canary.exists()


@pytest.mark.parametrize("content", [raw, zipped])
def test_what_loads_a_pickle_is_caught(tmp_path, canary, content):
    """The control: the payloads do what they are for."""
    path = tmp_path / "pickle"
    path.write_bytes(content(canary))
    torch.load(path, weights_only=False) if content is zipped else pickle.loads(path.read_bytes())
    assert canary.exists()


def forged_state(run_dir: Path, **changes: torch.Tensor | None) -> bytes:
    ((_, path),) = load_run(run_dir).checkpoints
    tensors = {"exp_avg/wte.weight": torch.zeros(320, 16)} | changes
    assert load_file(path / OPTIMIZER) == {}, "this run took no step"
    return to_bytes({name: t for name, t in tensors.items() if t is not None})


@pytest.mark.parametrize(
    "content",
    [
        lambda run, canary: raw(canary),
        lambda run, canary: zipped(canary),
        lambda run, canary: forged_state(run, **{"exp_avg/wte.weight": torch.zeros(3)}),
        lambda run, canary: forged_state(run, **{"exp_avg/nowhere": torch.zeros(3)}),
        lambda run, canary: forged_state(run, **{"wte.weight": torch.zeros(3)}),
        lambda run, canary: forged_state(run, **{"requires_grad/wte.weight": torch.zeros(320, 16)}),
        lambda run, canary: forged_state(run, **{"extra/scale": torch.zeros(2)}),
        lambda run, canary: forged_state(run),
    ],
)
def test_a_forged_optimizer_is_refused_before_it_is_used(run_dir, canary, content):
    path = forge(run_dir, OPTIMIZER, content(run_dir, canary))
    model = ckpt.load_model(path)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError) as caught:
        ckpt.load_training_state(model, optimizer, {"scale": torch.ones(())}, path)
    assert caught.value.exit_code == EXIT_CHECKPOINT
    assert not optimizer.state
    assert not canary.exists()


@pytest.mark.parametrize("extra", ["../../../outside", "/etc/passwd", "state.json/../../x", "", "a\0b"])
def test_a_manifest_names_no_other_file(run_dir, tmp_path, extra):
    """More names, or others, than a checkpoint has are refused; and the files themselves are not even opened."""
    ((step, path),) = load_run(run_dir).checkpoints
    digests = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in store.FILES}
    for files in (digests | {extra: "0" * 64}, {extra if k == STATE else k: v for k, v in digests.items()}):
        (path / MANIFEST).write_bytes(store.manifest(step, files))
        with pytest.raises(UserError, match="its list of files"):
            ckpt.load_model(path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[]", b"null", b'{"format": 2}', b'{"format": 1, "step": 1, "sha256": 3}', b"\xff"]
)
def test_a_manifest_that_is_none_is_refused(run_dir, content):
    ((_, path),) = load_run(run_dir).checkpoints
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match="MANIFEST.json cannot be read"):
        ckpt.load_model(path)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir [CANARY]",
        "model: {_target_: os.mkdir, path: CANARY}",
        "plugins: [EVIL]",
        "hydra: {job: {env_set: {NORMFREE_PLUGINS: EVIL}}}",
        "name: [" + "[" * 1100,
    ],
)
def test_the_settings_of_a_run_run_nothing(run_dir, tmp_path, canary, capfd, text):
    evil = tmp_path / "evil.py"
    evil.write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    text = text.replace("CANARY", str(canary)).replace("EVIL", str(evil))
    (run_dir / "config.yaml").write_text(text)
    status = json.loads((run_dir / "run.json").read_text())
    status["plugins"] = [{"path": str(evil), "sha256": hashlib.sha256(evil.read_bytes()).hexdigest()}]
    (run_dir / "run.json").write_text(json.dumps(status))
    assert cli.main([f"resume={run_dir}"]) != 0
    assert "error: " in capfd.readouterr().err
    assert not canary.exists()


def test_a_plugin_that_a_run_names_is_not_loaded(run_dir, tmp_path, canary, capfd):
    """Whole and valid otherwise: it is the user who types --plugin."""
    evil = tmp_path / "evil.py"
    evil.write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    status = json.loads((run_dir / "run.json").read_text())
    status["plugins"] = [{"path": str(evil), "sha256": hashlib.sha256(evil.read_bytes()).hexdigest()}]
    (run_dir / "run.json").write_text(json.dumps(status))
    assert cli.main([f"resume={run_dir}", "train.max_steps=400"]) != 0
    assert "that run used plug-ins; give the same files" in capfd.readouterr().err
    assert not canary.exists()


# -- data sets --------------------------------------------------------------------------------------------------------


def test_python_files_of_a_data_set_are_text(tmp_path, canary):
    code = f"import os\nos.mkdir({str(canary)!r})\n"
    for name in ("texts.py", "__init__.py", "conftest.py", "sitecustomize.py", "train.py"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(code + "".join(f"x{i} = {hash((name, i))}\n" for i in range(100)))
    data = DataConfig(source="files", path="texts", tokenizer="bytes", seq_len=8, cache_dir=str(tmp_path / "cache"))
    assert prepare(data, lambda line: None).tokens("train").size > 100
    assert not canary.exists()


def test_a_loading_script_is_not_run(tmp_path, canary):
    """What older versions of the library would have run, beside the data and in the folder one is in."""
    code = f"import os\nos.mkdir({str(canary)!r})\n"
    folder = tmp_path / "set"
    for place in (folder, tmp_path / "json", tmp_path / "parquet"):
        place.mkdir()
        for name in ("set.py", "json.py", "parquet.py", "__init__.py"):
            (place / name).write_text(code)
    rows = [json.dumps({"content": f"text {i}"}) for i in range(4)]
    for name in ("train-0.jsonl", "valid-0.jsonl"):
        (folder / name).write_text("\n".join(rows) + "\n")
    source = CodeParrot(DataConfig(source="codeparrot", path=str(folder), cache_dir=str(tmp_path / "cache")))
    assert len(list(source.documents("val"))) == 4
    assert not canary.exists()


def test_a_pickled_tokenizer_is_refused(tmp_path, canary, text_folder):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(raw(canary))
    (tmp_path / "tokenizer" / "tokenizer.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    data = DataConfig(source="files", path=str(text_folder), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json") as caught:
        prepare(data, lambda line: None)
    assert caught.value.exit_code == EXIT_DATA
    assert not canary.exists()


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_the_command_refuses_a_forged_run(run_dir, canary, capfd, file):
    """The whole way, as a user would meet it."""
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("precision: auto", "precision: fp32"))
    forge(run_dir, file, zipped(canary))
    assert cli.main([f"resume={run_dir}", "train.max_steps=400"]) == EXIT_CHECKPOINT
    assert "Traceback" not in capfd.readouterr().err
    assert not canary.exists()

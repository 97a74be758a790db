"""Words and presets that would run code: a canary's folder is never made, and the refusal says what is wrong."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest
from canary import Payload

from normfree import cli, words
from normfree.errors import EXIT_CONFIG


@pytest.fixture
def canary(tmp_path):
    """The folder that code would make. No test here leaves it behind, but the controls."""
    return tmp_path / "canary"


@pytest.fixture
def evil_file(tmp_path, canary):
    path = tmp_path / "evil.py"
    path.write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    return path


@pytest.fixture
def command(text_folder, tmp_path, monkeypatch):
    """The real command on the little corpus; its exit code."""
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(cli, "_plugins", {})
    base = ["data=files", f"data.path={text_folder}", "data.tokenizer=bytes", "train.max_steps=1"]
    base += ["model.n_layer=1", "model.n_embd=8", "model.n_head=2", "model.block_size=8", "diagnostics.every=0"]
    base += ["train.batch_size=2", "log.figures=false", "log.tensorboard=false", "train.eval_tokens=16"]
    return lambda *typed: cli.main([*base, *typed])


# -- what is typed ----------------------------------------------------------------------------------------------------

TYPED = [
    "model._target_=os.mkdir",
    "+model._target_=os.mkdir",
    "++hydra.callbacks.x={_target_:os.mkdir,path:CANARY}",
    "hydra.callbacks={x:{_target_:os.mkdir,path:CANARY}}",
    "hydra.launcher._target_=os.mkdir",
    "hydra/launcher=../evil",
    "hydra.searchpath=[file://FOLDER]",
    "hydra.job.env_set={NORMFREE_PLUGINS:EVIL}",
    "hydra.job_logging={version:1,formatters:{x:{'()':os.mkdir,path:CANARY}}}",
    "hydra.run.dir=CANARY",
    "hydra.output_subdir=CANARY",
    "optim.lr=${oc.env:HOME}",
    "diagnostics.statistics=['${oc.decode:x}']",
    "debug.inject={_target_:os.mkdir,path:CANARY}",
    "data.source={_target_:os.mkdir,path:CANARY}",
    "plugins=[EVIL]",
]
LATER = ["model.norm=os.mkdir", "model.act=!!python/object/apply:os.mkdir"]  # wrong by their values
LATER += ["diagnostics.statistics=[{_target_:os.mkdir}]"]
OPTIONS = [
    ["--config-dir", "FOLDER"],
    ["--config-dir=FOLDER"],
    ["--config-path=FOLDER"],
    ["-cn", "evil"],
    ["--experimental-rerun", "PICKLE"],
    ["--plug", "EVIL"],
]


@pytest.fixture
def meant(tmp_path, canary, evil_file):
    """`meant(words)`: with this test's files in them, all of which are there."""
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Payload(canary)))
    (tmp_path / "evil.yaml").write_text(f"hydra: {{job: {{env_set: {{NORMFREE_PLUGINS: {evil_file}}}}}}}\n")
    names = {"CANARY": canary, "EVIL": evil_file, "FOLDER": tmp_path, "PICKLE": tmp_path / "job.pickle"}

    def fill(typed: list[str]) -> list[str]:
        for name, path in names.items():
            typed = [word.replace(name, str(path)) for word in typed]
        return typed

    return fill


@pytest.mark.parametrize("typed", [TYPED + LATER, *OPTIONS], ids=["words", *(" ".join(words) for words in OPTIONS)])
def test_nothing_typed_but_plugin_runs_code(command, tmp_path, meant, capfd, typed):
    before = sorted(tmp_path.rglob("*"))
    assert command(*meant(typed)) == EXIT_CONFIG
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") >= (len(typed) if typed[0] in TYPED else 1), "one line a fault"
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("multirun", [False, True])
def test_each_word_that_would_is_refused_by_itself(tmp_path, meant, multirun):
    for word in meant(TYPED):
        typed = words.read([word], multirun)
        assert typed.problems, word
        assert not typed.good, "Hydra does not get to see it"


def test_a_plugin_that_the_user_typed_does(command, canary, evil_file):
    """The control: the same file, by the one way there is."""
    command("--plugin", str(evil_file), "optim.lr=-1")
    assert canary.exists()


# -- presets ----------------------------------------------------------------------------------------------------------

PRESETS = {
    "target": "model: {_target_: os.mkdir, path: CANARY}",
    "tag": "model: {act: !!python/object/apply:os.mkdir [CANARY]}",
    "callback": "hydra: {callbacks: {x: {_target_: builtins.open, file: CANARY, mode: w}}}",
    "environment": "hydra: {job: {env_set: {NORMFREE_PLUGINS: EVIL}}}",
    "environment by package": "NORMFREE_PLUGINS: EVIL",
    "logging": "hydra: {job_logging: {formatters: {x: {(): os.mkdir, path: CANARY}}}}",
    "launcher": "hydra: {launcher: {_target_: os.mkdir}}",
    "another launcher": "defaults: [override /hydra/launcher: joblib]",
    "sweeper": "hydra: {sweeper: {_target_: os.mkdir}}",
    "search path": "hydra: {searchpath: ['file://FOLDER']}",
    "plug-in": "plugins: [EVIL]",
    "resolver": "name: ${oc.env:HOME}",
    "unknown": "optim: {lrr: 1}",
    "no YAML": "optim: [",
}


def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, package: str = "_global_") -> None:
    """A conf/ of one's own, with `experiment=evil` in it."""
    folder = tmp_path / "conf"
    if not folder.exists():
        shutil.copytree(words.CONF, folder)
    for name, path in {"CANARY": tmp_path / "canary", "EVIL": tmp_path / "evil.py", "FOLDER": tmp_path}.items():
        text = text.replace(name, str(path))
    (folder / "experiment" / "evil.yaml").write_text(f"# @package {package}\n{text}\n")
    monkeypatch.setattr(cli, "CONF", folder)
    monkeypatch.setattr(words, "CONF", folder)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_runs_code(command, tmp_path, canary, evil_file, monkeypatch, capfd, name):
    preset(tmp_path, monkeypatch, PRESETS[name], "hydra.job.env_set" if "package" in name else "_global_")
    assert command("experiment=evil") == EXIT_CONFIG
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()


def test_no_preset_of_a_sweep_runs_code(command, tmp_path, canary, evil_file, monkeypatch, capfd):
    preset(tmp_path, monkeypatch, PRESETS["environment"])
    assert command("-m", "run_dir=a,b", "experiment=cpu_demo,evil") == EXIT_CONFIG
    assert "hydra.job: set by a file in conf/" in capfd.readouterr().err
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("ignore:Callback")  # the file that is opened is none
def test_a_preset_that_is_believed_is_caught(tmp_path, canary, evil_file, monkeypatch):
    """The control: Hydra with the same file, and nobody who looks at it."""
    preset(tmp_path, monkeypatch, PRESETS["callback"])
    monkeypatch.setattr(sys, "argv", ["run.py", "experiment=evil"])
    cli._compose([])  # registers the schema
    job = cli.hydra.main(version_base="1.3", config_path=str(tmp_path / "conf"), config_name="config")(lambda cfg: None)
    job()
    assert canary.exists()

"""Going on with something changed: every key has a class, and a run is never continued on other text or token ids."""

import json
from dataclasses import dataclass
from typing import get_args

import pytest
from crashes import record
from drawn import DEFAULTS, changed

from normfree import cli
from normfree.config import Config, flat_keys, from_dict, key, resolve, to_dict
from normfree.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DIRECTORY, UserError
from normfree.records import RunWriter
from normfree.rules import CHOICES
from normfree.training import session

# The class of each key, said a second time: whoever adds a key decides here whether a run may go on with it changed.
MAY_CHANGE = {
    "name", "data.cache_dir", "train.eval_every", "train.eval_tokens", "train.checkpoint_every",
    "train.keep_checkpoints", "train.fast", "train.compile", "train.deterministic", "train.device", "train.gpus",
    "diagnostics.every", "diagnostics.snapshot_every", "diagnostics.statistics", "diagnostics.probe_sequences",
    "diagnostics.watch", "diagnostics.ring", "diagnostics.warn_factor", "diagnostics.warn_window",
    "log.tensorboard", "log.every", "log.wandb", "log.wandb_project", "log.figures", "log.sample_prompt",
}  # fmt: skip
PLACES = {"run_dir", "resume"}  # where a run is, and not what it is
# Of MUST_AGREE, what names nothing in a run of the defaults: no rollback, and no fault that is planted.
IDLE = {"rollback.retries", "rollback.lr_factor", "rollback.steps"} | {
    f"debug.inject.{name}" for name in ("module", "phase", "value")
}
MUST_AGREE = {
    "seed", "init_from", "nan_policy", "spike_sigma", "rollback.retries", "rollback.lr_factor", "rollback.steps",
    "model.n_layer", "model.n_head", "model.n_embd", "model.n_inner", "model.block_size", "model.vocab_size",
    "model.vocab_used", "model.norm", "model.placement", "model.final_norm", "model.norm_eps", "model.act",
    "model.act_slope", "model.act_scope", "model.act_beta", "model.embed_scale", "model.positions",
    "model.rotary_pct", "model.rotary_base", "model.parallel_residual", "model.tie_embeddings", "model.loss",
    "model.bias.qk", "model.bias.v", "model.bias.attn_proj", "model.bias.mlp_fc", "model.bias.mlp_proj",
    "model.dropout.embed", "model.dropout.attn", "model.dropout.resid", "model.init.std", "model.init.depth_scaled",
    "data.source", "data.path", "data.text_column", "data.tokenizer", "data.vocab_size", "data.seq_len",
    "data.chunks", "data.max_documents", "data.fingerprint", "optim.lr", "optim.beta1", "optim.beta2", "optim.eps",
    "optim.weight_decay", "optim.decay_slopes", "optim.grad_clip", "optim.schedule", "optim.warmup_steps",
    "optim.warmup_fraction", "optim.lr_final", "optim.decay_fraction", "train.max_steps", "train.batch_size",
    "train.micro_batch_size", "train.precision", "debug.inject.step", "debug.inject.module", "debug.inject.phase",
    "debug.inject.value",
}  # fmt: skip


def without_class(config: object) -> set[str]:
    return {name for name, _, _ in flat_keys(config)} - (MAY_CHANGE | MUST_AGREE | PLACES)


def test_every_key_has_a_class():
    assert without_class(Config()) == set()
    assert not MAY_CHANGE & MUST_AGREE


def test_a_new_key_without_a_class_is_caught():
    """The control: a setting more."""

    @dataclass
    class Larger(Config):
        new: int = key(1, "something")

    assert without_class(Larger()) == {"new"}


def another(name: str) -> object:
    """A value that is not the default; of its type."""
    default = DEFAULTS[name]
    others = [choice for choice in CHOICES.get(name, ()) if choice != default]
    if others:
        return others[0]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    if isinstance(default, str):
        return default + "x"
    kinds: dict[type, object] = {bool: True, int: 3, float: 2.5, str: "x"}
    section: object = Config()
    for part in name.split(".")[:-1]:
        section = getattr(section, part)
    annotation = type(section).__dataclass_fields__[name.split(".")[-1]].type  # type: ignore[attr-defined]
    return next((kinds[kind] for kind in get_args(annotation) if kind in kinds), ["nan_count"])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run's directory with its settings, the defaults, and nothing trained."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    writer = RunWriter(folder)
    writer.config(Config())
    writer.close()
    return folder


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - PLACES))
def test_every_key_is_refused_or_allowed_as_its_class_says(begun, name):
    """The same command with one key changed, and `resume=` with that key typed."""
    old, new = DEFAULTS[name], another(name)
    assert new != old
    config = changed(Config(), {name: new})
    if name in MAY_CHANGE | IDLE:
        assert session.starting_point(config, begun, []) is None
        assert {k: v for k, v, _ in flat_keys(resumed(begun, name, new))}[name] == new
        return
    with pytest.raises(UserError) as caught:
        session.starting_point(config, begun, [])
    assert caught.value.exit_code == EXIT_DIRECTORY
    assert f"{name}: {new!r}, not {old!r}" in str(caught.value)
    if name == "train.max_steps":
        assert resumed(begun, name, new).train.max_steps == new, "by name a run may be made longer"
        return
    with pytest.raises(UserError) as caught:
        resumed(begun, name, new)
    assert caught.value.exit_code == EXIT_CONFIG
    assert f"{name}: {new!r}, not {old!r}" in str(caught.value)


@pytest.mark.parametrize("name", sorted(IDLE))
def test_keys_that_name_something_in_a_run_must_agree(tmp_path, name):
    """Also where it is what was typed that makes them matter."""
    busy = {"nan_policy": "rollback"} if name.startswith("rollback") else {"debug.inject.step": 3}
    writer = RunWriter(tmp_path)
    writer.config(changed(Config(), busy))
    writer.close()
    with pytest.raises(UserError, match=f"{name}: "):
        session.starting_point(changed(Config(), busy | {name: another(name)}), tmp_path, [])
    with pytest.raises(UserError, match=f"{name}: "):
        resumed(tmp_path, name, another(name))


def resumed(run_dir, name: str, value: object) -> Config:
    return cli.resumed_config(changed(Config(resume=str(run_dir)), {name: value}), [f"resume={run_dir}", f"{name}=1"])


def test_all_that_is_refused_is_said_at_once(begun, monkeypatch, capfd):
    """Through the command."""
    monkeypatch.setattr("sys.argv", ["run.py"])
    words = ["optim.lr=0.5", "seed=7", "model.act=relu", "size=70m", "train.max_steps=2"]
    assert cli.main([f"resume={begun}", *words]) == EXIT_CONFIG
    said = capfd.readouterr().err
    for line in ("optim.lr: 0.5, not 0.003", "seed: 7, not 1", "model.act: 'relu', not 'gelu_tanh'",
                 "size is a choice of that run", "train.max_steps: 2, less than its 300"):  # fmt: skip
        assert line in said
    assert not [path for path in begun.rglob("*") if path.name not in ("config.yaml", "arrays")]


FREE = {
    "name": "other", "train.eval_every": 2, "train.eval_tokens": 128, "train.checkpoint_every": 1,
    "train.keep_checkpoints": 3, "train.fast": False, "train.compile": False, "train.deterministic": True,
    "train.device": "cpu",
    "diagnostics.every": 1, "diagnostics.snapshot_every": 1, "diagnostics.statistics": ["nan_count"],
    "diagnostics.probe_sequences": 1, "diagnostics.watch": "all", "diagnostics.ring": 2,
    "diagnostics.warn_factor": 9.0, "diagnostics.warn_window": 3, "log.tensorboard": True, "log.every": 3,
    "log.wandb_project": "x", "log.figures": True, "log.sample_prompt": "x", "data.cache_dir": "elsewhere",
}  # fmt: skip
FREE = {name: value for name, value in FREE.items() if name in DEFAULTS}


@pytest.mark.filterwarnings("ignore")
def test_what_may_change_changes_no_weight_and_is_written_down(train_tiny, tiny, monkeypatch):
    """Everything that may be changed, changed at once in the middle of a run; the weights end as they would have."""
    assert DEFAULTS.keys() & MAY_CHANGE - FREE.keys() == {"train.gpus", "log.wandb"}, (
        "one value for now; another service"
    )
    monkeypatch.setattr("plotting.draw_all", lambda run, folder: {})
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("run", **{"model.dropout.resid": 0.1})
    whole = train_tiny("whole", **{"model.dropout.resid": 0.1})
    run = train_tiny("run", **{"model.dropout.resid": 0.1}, **FREE)
    (event,) = [event for event in run.status["events"] if event["kind"] == "settings"]
    before = {name: value for name, value, _ in flat_keys(resolve(tiny()))}
    for name, value in FREE.items():
        if value != before[name]:
            assert f"{name}: {value!r}, not " in event["text"], name
    ours, theirs = record(run.directory), record(whole.directory)
    for name in ("model", "optimizer"):
        path = f"checkpoints/step-00000006/{name}.safetensors"
        assert ours[path] == theirs[path]


def stopped_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = session.Trainer.train_step

    def train_step(self, at, *rest):
        if at == step:
            raise KeyboardInterrupt
        original(self, at, *rest)

    patch.setattr(session.Trainer, "train_step", train_step)


def test_a_run_that_is_made_longer_says_so(train_tiny):
    train_tiny("run", **{"train.max_steps": 1})
    run = train_tiny("run", resume="run", **{"train.max_steps": 2})
    assert [event["text"] for event in run.status["events"] if event["kind"] == "settings"] == [
        "goes on from step 1 with other settings: train.max_steps: 2, not 1"
    ]


# -- S15: other text, other tokens ------------------------------------------------------------------------------------


def fingerprints(run) -> str:
    return run.config.data.fingerprint


@pytest.mark.parametrize("changes", [{"data.tokenizer": "code8k"}, {"data.max_documents": 20}])
def test_a_run_does_not_go_on_with_another_corpus(train_tiny, tmp_path, changes):
    """The same command with another tokenizer, or other text: both fingerprints are shown."""
    first = train_tiny("run", **{"train.max_steps": 1})
    theirs = train_tiny("other", **changes, **{"train.max_steps": 1})
    before = record(first.directory)
    with pytest.raises(UserError) as caught:
        train_tiny("run", **changes, **{"train.max_steps": 1})
    assert caught.value.exit_code == EXIT_DIRECTORY
    assert f"data.fingerprint: {fingerprints(theirs)!r}, not {fingerprints(first)!r}" in str(caught.value)
    assert record(first.directory) == before


def test_a_resumed_run_notices_that_its_text_has_changed(train_tiny, tmp_path, text_folder, capfd):
    """The settings are the same; the files are not."""
    (tmp_path / "texts").mkdir()
    for path in text_folder.iterdir():
        (tmp_path / "texts" / path.name).write_bytes(path.read_bytes())
    run = train_tiny("run", **{"data.path": str(tmp_path / "texts"), "train.max_steps": 1})
    before = record(run.directory)
    with (tmp_path / "texts" / "00.py").open("a") as file:
        file.write("one line more\n" * 20)
    assert cli.main([f"resume={run.directory}", "train.max_steps=9"]) == EXIT_DATA
    said = capfd.readouterr().err
    assert f"data.fingerprint={fingerprints(run)}, but the corpus is " in said
    assert record(run.directory) == before


def test_weights_are_not_taken_over_by_another_tokenizer(train_tiny, tmp_path, monkeypatch):
    """257 and 300 ids are both rounded up to 320 rows: the shapes agree, the ids mean other text."""
    trained = {"data.tokenizer": "trained", "data.vocab_size": 300, "train.max_steps": 1}
    source = train_tiny("source", **{"train.max_steps": 1})
    other = train_tiny("other", **trained)
    assert source.config.model.vocab_size == other.config.model.vocab_size == 320
    ours, theirs = (json.loads((r.directory / "tokenizer/tokenizer_meta.json").read_text()) for r in (source, other))
    for place in (source.directory, source.checkpoints[-1][1]):
        with pytest.raises(UserError) as caught:
            train_tiny("new", init_from=str(place), **trained)
        assert caught.value.exit_code == EXIT_DATA
        assert ours["fingerprint"] in str(caught.value)
        assert theirs["fingerprint"] in str(caught.value)
        assert not (tmp_path / "new").exists()
    # The control: without that comparison, the same weights are taken.
    monkeypatch.setattr("normfree.data.tokenizer.require_same_tokenizer", lambda *args: None)
    assert train_tiny("new", init_from=str(source.directory), **trained).status["status"] == "finished"


def test_settings_of_another_version_are_named():
    values = to_dict(Config())
    values["optim"]["lrr"] = 1
    values["model"]["n_layer"] = "2"
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert "unknown key 'optim.lrr'. Did you mean 'optim.lr'" in str(caught.value)
    assert "model.n_layer='2' is not a whole number" in str(caught.value)

"""A planted fault is named exactly, kept, and found again at its place; a replay says what kind of fault it was."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from planting import GPT2, NORMFREE, SHORT, names, planted_run, sites
from safetensors.torch import load_file, save_file

from normfree.cli import run_config
from normfree.config import Config
from normfree.diagnostics.replay import main
from normfree.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DIRECTORY, UserError
from normfree.runs import load_run
from normfree.training import machine
from normfree.training.postmortem import advice, load_postmortem, ring_table
from normfree.training.replaying import NOT_REPRODUCED, SPIKE, judge, replay

CPU = torch.device("cpu")
TWO = {"train.micro_batch_size": 4}  # micro-batches


@pytest.mark.parametrize("count", [24, pytest.param(50, marks=pytest.mark.soak)])
def test_faults_at_random_sites_are_named_exactly_and_found_again(tiny, tmp_path, count):
    missed, moved = [], []
    for i, (settings, *site) in enumerate(sites(count)):
        phase, path, _, value = site
        micro = 8 if i % 5 else 4  # every fifth run accumulates two micro-batches
        pm = planted_run(tiny, tmp_path / str(i), settings, *site, **{"train.micro_batch_size": micro})
        if pm is None or not names(pm.finding, phase, path, value):
            missed.append((site, pm and pm.finding))
            continue
        result = replay(pm, CPU)
        if result.verdict != "planted" or not result.same_place or not all(p.bad for p in result.passes):
            moved.append((site, result))
    print(f"{count - len(missed)} of {count} named exactly, {len(moved)} found elsewhere by the replay")
    assert len(missed) <= 2, missed
    assert not moved


def test_a_compiled_step_meets_the_planted_fault_too(tiny, tmp_path, monkeypatch):
    """In the backward pass; tests/gpu/test_faults.py has 50 sites through the real compiler."""

    def compiled(model, enabled):
        assert enabled
        return torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(machine, "compiled", compiled)
    settings = GPT2 | {"model.n_layer": 1, "train.compile": True}
    pm = planted_run(tiny, tmp_path / "run", settings, "backward", "blocks.0.mlp.fc", 2, "nan")
    assert names(pm.finding, "backward", "blocks.0.mlp.fc", "nan")
    result = replay(pm, CPU)
    assert result.passes[0].name == "as trained, compiled"
    assert result.passes[0].bad
    assert (result.verdict, result.same_place) == ("planted", True)


@pytest.fixture
def planted(tiny, tmp_path):
    return planted_run(tiny, tmp_path / "run", NORMFREE, "forward", "blocks.1.mlp.fc", 3, "nan", **TWO)


def change_config(pm, **keys):
    path = pm.directory / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["debug"]["inject"].update(keys)
    path.write_text(yaml.safe_dump(values))
    return load_postmortem(pm.directory)


def change_weights(pm, change):
    """Rewrite the postmortem's weights, and the manifest with them."""
    import hashlib

    from normfree.training import store

    path = pm.checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    path.unlink()  # the file is a hard link
    save_file(weights, path)
    digests = {name: hashlib.sha256((pm.checkpoint / name).read_bytes()).hexdigest() for name in store.FILES}
    (pm.checkpoint / "MANIFEST.json").unlink()
    (pm.checkpoint / "MANIFEST.json").write_bytes(store.manifest(pm.step, digests))


def test_without_the_fault_the_step_is_finite(planted):
    result = replay(change_config(planted, step=None, module=None), CPU)
    assert result.verdict == "not reproduced"
    assert not any(p.bad for p in result.passes)
    assert not result.same_place
    losses = [p.loss for p in result.passes]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_replayed_loss_is_the_trained_one(tiny, tmp_path, train_tiny):
    """A moment's fault leaves the loss alone: every digit is the run's, dropout and two micro-batches included."""
    settings = GPT2 | TWO | {"model.dropout.resid": 0.1, "model.dropout.attn": 0.1}
    pm = planted_run(tiny, tmp_path / "bad", settings, "optimizer", "final_norm.weight.exp_avg_sq", 3, "inf")
    healthy = train_tiny("healthy", **SHORT | settings)
    loss = healthy.series("train/loss")[1][3]
    assert pm.circumstances.loss == loss
    result = replay(pm, CPU)
    assert result.passes[0].loss == loss
    assert result.passes[1].loss == pytest.approx(loss, rel=1e-6)


def test_overflow_is_told_from_divergence(planted):
    pm = change_config(planted, step=None, module=None)

    def scale(weights):
        weights["blocks.0.mlp.fc.weight"].mul_(1e25)
        weights["blocks.0.mlp.proj.weight"].mul_(1e20)

    change_weights(pm, scale)
    result = replay(pm, CPU)
    assert result.verdict == "overflow"
    assert result.finding.module == "blocks.0.mlp.proj"
    assert "fp32 ends at 3.4e+38" in result.words
    assert not result.same_place

    change_weights(pm, lambda weights: weights["blocks.0.mlp.fc.weight"].fill_(float("inf")))
    result = replay(pm, CPU)
    assert result.verdict == "divergence"
    assert result.finding.site == "blocks.0.mlp.fc.weight"


def test_half_precision_overflow(tiny, tmp_path):
    """Trained to it: activations beyond 65504 in fp16, harmless in float64."""
    changes = {"train.precision": "fp16", "model.norm": "none", "optim.lr": 900.0, "optim.grad_clip": 0.0}
    run = load_run(run_config(tiny(run_dir=str(tmp_path / "run"), **SHORT | changes)).run_dir)
    result = replay(load_postmortem(run.directory), CPU)
    assert result.verdict == "overflow"
    assert result.same_place
    assert "65504" in result.words or "6.55e+04" in result.words


def test_the_command(planted, capsys, tmp_path):
    out = tmp_path / "verdict.json"
    assert main([str(planted.directory.parent.parent), "--json", str(tmp_path)]) == EXIT_DIRECTORY
    assert main([str(planted.directory.parent.parent), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "verdict: planted" in text
    assert "the same place" in text
    saved = json.loads(out.read_text())
    assert (saved["verdict"], saved["same_place"], len(saved["passes"])) == ("planted", True, 3)


def test_a_replay_on_another_device_says_so(planted):
    told = json.loads((planted.directory / "finding.json").read_text())
    told["circumstances"]["device"] = "cuda"
    (planted.directory / "finding.json").write_text(json.dumps(told))
    result = replay(load_postmortem(planted.directory), CPU)
    assert "on cuda, this replay is on cpu" in result.notes[0]


def test_what_cannot_be_replayed_is_said(planted, tmp_path, capsys):
    assert main([str(tmp_path)]) == EXIT_CHECKPOINT
    assert "neither a postmortem directory nor a run" in capsys.readouterr().err
    told = json.loads((planted.directory / "finding.json").read_text())
    told["circumstances"]["plugins"] = [{"path": "mine.py", "sha256": "0"}]
    (planted.directory / "finding.json").write_text(json.dumps(told))
    assert main([str(planted.directory)]) == EXIT_CONFIG
    assert "--plugin mine.py" in capsys.readouterr().err
    with open(planted.checkpoint / "model.safetensors", "r+b") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="damaged"):
        load_postmortem(planted.directory)


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_the_postmortem_holds_the_step(planted):
    run = load_run(planted.directory.parent.parent)
    with np.load(planted.directory / "batch.npz") as batch:
        assert batch["rows"].dtype == np.int32
        assert batch["rows"].shape == (8, 17)
        assert batch["indices"].shape == (8,)
        assert batch["micro_batch_size"] == 4
    text = (planted.directory / "README.txt").read_text()
    assert "blocks.1.mlp.fc turned inputs" in text
    assert "python -m normfree.diagnostics.replay" in text
    assert planted.config.debug.inject.module == "blocks.1.mlp.fc"
    state, kept = (run.checkpoints[-1][1], planted.checkpoint)
    assert (state / "model.safetensors").samefile(kept / "model.safetensors")
    assert run.status["fault"]["text"] == planted.finding.words()
    assert run.status["fault"]["reproduced"]
    assert not list(planted.directory.parent.glob(".step-*"))


def test_the_terminal_says_what_the_readme_says(tiny, tmp_path, capsys):
    """And says it again when the run is asked for again."""
    pm = planted_run(tiny, tmp_path / "run", GPT2, "forward", "blocks.1.mlp.fc", 1, "inf")
    said = capsys.readouterr().err
    next_steps = (pm.directory / "README.txt").read_text().partition("What to try")[2]
    assert "nothing: the fault was planted by debug.inject" in next_steps
    assert f"    python -m normfree.diagnostics.replay {pm.directory}" in next_steps.splitlines()
    assert next_steps in said
    assert f"postmortem: {pm.directory}" in said.splitlines()
    reason = load_run(tmp_path / "run").status["reason"]
    assert "planted by debug.inject" in reason
    assert "optim.lr" not in said + reason
    run_config(pm.config)
    again = capsys.readouterr().err
    assert "planted by debug.inject" in again
    assert f"    python -m normfree.diagnostics.replay {pm.directory}" in again.splitlines()


def test_a_fault_that_was_planted_elsewhere_excuses_no_other(planted):
    """Under nan_policy=skip a run goes on behind the planted step, and may diverge by itself."""
    assert "planted" in advice(planted.config, planted.step, None)[0]
    assert "optim.lr" in advice(planted.config, planted.step + 1, None)[0]


def test_a_full_disk_does_not_hide_the_divergence(tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert planted_run(tiny, tmp_path / "run", GPT2, "forward", "wte", 1, "nan") is None
    run = load_run(tmp_path / "run")
    assert run.status["status"] == "diverged"
    assert "wte" in run.status["reason"]
    assert "No space left" in run.status["warnings"][0]
    assert not list((tmp_path / "run" / "postmortem").iterdir())


def test_no_fault_no_postmortem(train_tiny):
    run = train_tiny(**SHORT)
    assert run.status["status"] == "finished"
    assert run.status.get("fault") is None
    assert not (run.directory / "postmortem").exists()


def test_a_masked_step_keeps_the_weights_of_the_step_before(train_tiny, planted):
    """What was planted is in no file."""
    assert all(t.isfinite().all() for t in load_file(planted.checkpoint / "model.safetensors").values())
    healthy = train_tiny("healthy", **SHORT | NORMFREE | TWO | {"train.max_steps": 3})
    one, two = (load_file(path / "model.safetensors") for path in (planted.checkpoint, healthy.checkpoints[-1][1]))
    assert all(one[name].equal(two[name]) for name in one)


def test_the_ring_as_text():
    ring = {"step": np.arange(20), "loss": np.linspace(5, 4, 20), "resid_max": np.full((20, 3), np.nan)}
    lines = ring_table(ring).splitlines()
    assert len(lines) == 11
    assert lines[0].split() == ["step", "loss", "max", "resid_max"]
    assert lines[-1].split() == ["19", "4", "nan"]
    assert ring_table({}) == ""


@pytest.mark.parametrize(("again", "verdict"), [(9.21554, SPIKE), (5.0, NOT_REPRODUCED)])
def test_a_spike_is_told_from_what_did_not_happen_again(again, verdict):
    """It was called not reproduced though the loss was the same to the last digit."""
    seen = SimpleNamespace(loss=9.21554, grad_norm=0.9)
    pm = SimpleNamespace(config=Config(spike_sigma=0.7), circumstances=seen, step=74)
    once_more = SimpleNamespace(bad=False, loss=again)
    found, words = judge(pm, once_more, once_more, once_more)
    assert found == verdict
    assert ("spike_sigma" in words) == (verdict == SPIKE)

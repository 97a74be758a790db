"""What a run records of itself, and what it says while it trains."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from normfree.diagnostics import STATISTICS
from normfree.diagnostics.hooks import is_forward
from normfree.runs import SITES, load_run
from normfree.training.loop import Trainer

QUIET = {"train.eval_every": 0, "train.checkpoint_every": 0, "train.eval_tokens": 16, "diagnostics.probe_sequences": 0}
LAYERS, HEADS, T = 2, 2, 16  # of a tiny run

# What one record is: axes, their lengths, and the unit.
HEAD = (("layer", "head"), (LAYERS, HEADS))
COUNTS = (("site", "layer"), (len(SITES), LAYERS), "elements")
OUTSIDE = (("layer_or_outside",), (LAYERS + 1,), "elements")
RECORDS = {
    "attn_entropy": (*HEAD, "nats"),
    "max_score": (*HEAD, ""),
    "sink_mass": (*HEAD, "probability"),
    "one_minus_max": (*HEAD, "probability"),
    "nan_count": COUNTS,
    "inf_count": COUNTS,
    "peak": (("site", "layer"), (4, LAYERS), ""),
    "resid_max": (("layer",), (LAYERS,), ""),
    "resid_rms": (("layer",), (LAYERS,), ""),
    "mlp_pre_std": (("layer",), (LAYERS,), ""),
    "position_entropy": (("layer", "head", "position"), (LAYERS, HEADS, T), "nats"),
    "entropy_quantiles": (("layer", "head", "quantile"), (LAYERS, HEADS, 7), "share of the row's ceiling"),
    "effective_width": (*HEAD, "keys"),
    "grad_norm": (("layer",), (LAYERS,), ""),
    "update_norm": (("layer",), (LAYERS,), ""),
    "grad_nan_count": OUTSIDE,
    "grad_inf_count": OUTSIDE,
    "param_nan_count": OUTSIDE,
    "param_inf_count": OUTSIDE,
}
OF_RECORDS = {"overloaded": (("layer",), (LAYERS,), "heads"), "collapsed": (("layer",), (LAYERS,), "heads")}


# -- arrays -----------------------------------------------------------------------------------------------------------


def test_every_statistic_is_recorded_with_its_axes_and_unit(train_tiny):
    """Under `diagnostics.statistics: null`, which stands for all of them."""
    run = train_tiny(**QUIET, **{"diagnostics.snapshot_every": 4, "train.max_steps": 8})
    assert run.config.diagnostics.statistics == list(STATISTICS)
    assert set(run.array_names) == set(STATISTICS) | set(OF_RECORDS) | {"elements"}
    for name, (axes, shape, unit) in (RECORDS | OF_RECORDS).items():
        info = run.info(name)
        assert (info.axes, info.shape, info.unit) == (axes, shape, unit), name
        steps, values = run.array(name)
        snapshot = name in STATISTICS and is_forward(name) and STATISTICS[name].snapshot
        assert steps.tolist() == ([0, 4] if snapshot else [0, 2, 4, 6]), name
        assert values.dtype == (np.int64 if unit in ("elements", "heads") else np.float32), name
        assert np.isfinite(values).all(), name
        assert values.any() == (not name.endswith("_count") and name != "collapsed"), name
    assert (run.array("elements")[1] == 8 * np.array([16 * T] * 3 + [HEADS * T * T] + [16 * T] * 3 + [64 * T])).all()


def test_the_probe_has_the_forward_statistics_alone(train_tiny):
    run = train_tiny(**QUIET | {"diagnostics.probe_sequences": 2, "diagnostics.snapshot_every": 4})
    probed = {name.removeprefix("probe_") for name in run.array_names if name.startswith("probe_")}
    assert probed == {name for name in STATISTICS if is_forward(name)} | {"elements"}
    for name in probed - {"elements"}:
        assert run.info(f"probe_{name}") == run.info(name)
        steps = [0, 4, 6] if STATISTICS[name].snapshot else [0, 2, 4, 6]
        assert run.array(f"probe_{name}")[0].tolist() == steps, "after the last update too"


def test_each_statistic_can_be_had_alone(train_tiny):
    """And says then what it says among all the others."""
    settings = QUIET | {"train.max_steps": 2, "diagnostics.every": 1, "diagnostics.snapshot_every": 1}
    settings |= {"diagnostics.watch": "all", "model.n_embd": 8, "train.batch_size": 2}
    everything = train_tiny("all", **settings)
    for name in STATISTICS:
        run = train_tiny(name, **settings, **{"diagnostics.statistics": [name]})
        assert run.status["status"] == "finished"
        beside = {"elements", "overloaded"} if name == "attn_entropy" else {"elements"}
        assert set(run.array_names) == {name} | beside
        assert np.array_equal(run.array(name)[1], everything.array(name)[1]), name


# -- gradients and updates --------------------------------------------------------------------------------------------

EVERY = QUIET | {"diagnostics.every": 1, "train.checkpoint_every": 1, "train.keep_checkpoints": 9}


def block_norms(tensors):
    """(n_layer,) of a dict name -> tensor."""
    blocks = [[t for name, t in tensors.items() if name.startswith(f"blocks.{layer}.")] for layer in range(LAYERS)]
    return [torch.cat([t.flatten() for t in block]).norm().item() for block in blocks]


def weights(run):
    return {step: load_file(path / "model.safetensors") for step, path in run.checkpoints}


def test_update_norm_is_what_lies_between_two_checkpoints(train_tiny):
    run = train_tiny(**EVERY)
    saved = weights(run)
    steps, norms = run.array("update_norm")
    assert steps.tolist() == list(range(6))
    for step in range(1, 6):  # there is no checkpoint before the first step
        difference = {name: saved[step + 1][name] - saved[step][name] for name in saved[step]}
        assert norms[step] == pytest.approx(block_norms(difference), rel=1e-4)


def test_grad_norm_is_that_of_the_whole_step_before_clipping(train_tiny, monkeypatch):
    seen, original = [], Trainer.backward_passes

    def passes(self, *args):
        result = original(self, *args)
        seen.append(block_norms({name: p.grad for name, p in self.model.named_parameters()}))
        return result

    monkeypatch.setattr(Trainer, "backward_passes", passes)
    run = train_tiny(**EVERY | {"optim.grad_clip": 1e-3, "train.micro_batch_size": 4})
    found = run.array("grad_norm")[1]
    assert found == pytest.approx(np.array(seen), rel=1e-5)
    assert (found > 0.01).all(), "so small that clipping would not show"


INJECTED = {
    "backward": ("blocks.1.mlp.fc.weight", "nan", "grad_nan_count", 1),
    "weight": ("blocks.0.attn.qkv.weight", "inf", "param_inf_count", 0),
    "outside": ("wte.weight", "-inf", "grad_inf_count", LAYERS),
}


@pytest.mark.parametrize("case", INJECTED)
def test_a_planted_gradient_or_weight_is_counted_and_the_step_that_met_it_changes_nothing(train_tiny, case):
    path, value, name, place = INJECTED[case]
    phase = "forward" if case == "weight" else "backward"
    inject = {"debug.inject.step": 3, "debug.inject.module": path, "debug.inject.value": value}
    run = train_tiny(nan_policy="skip", **EVERY, **inject, **{"debug.inject.phase": phase})
    counts = run.array(name)[1]
    assert counts[3, place] == 1
    if case != "weight":  # whose gradients are all bad
        assert counts[3].sum() == 1
    assert not np.delete(counts, 3, axis=0).any()
    updates = run.array("update_norm")[1]
    assert np.array_equal(updates[3], [np.nan if case == "weight" else 0, 0], equal_nan=True), "Inf - Inf is NaN"
    assert (np.delete(updates, 3, axis=0) > 0).all()
    saved = weights(run)
    assert all(saved[3][name].equal(saved[4][name]) for name in saved[3])


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "bad"), [("blocks.1", 1), ("blocks.0", T)])
def test_bad_rows_of_the_loss_are_counted_where_there_are_any(train_tiny, path, bad):
    """A NaN in the last block's output is in the loss of one token; below an attention, in those of its sequence."""
    run = train_tiny(nan_policy="skip", **QUIET, **{"debug.inject.step": 3, "debug.inject.module": path})
    steps, rows = run.series("bad_loss_rows")
    assert (steps.tolist(), rows.tolist()) == ([3], [bad])
    assert np.isnan(run.series("train/loss")[1]).tolist() == [False, False, False, True, False, False]


def test_a_finite_loss_whose_gradient_is_not_has_no_bad_rows(train_tiny):
    inject = {"debug.inject.step": 3, "debug.inject.module": "blocks.1", "debug.inject.phase": "backward"}
    run = train_tiny(nan_policy="skip", **QUIET, **inject)
    assert run.series("bad_steps")[1][-1] == 1
    assert "bad_loss_rows" not in run.metrics


# -- warnings ---------------------------------------------------------------------------------------------------------

DOOMED = QUIET | {"train.max_steps": 50, "optim.warmup_steps": 50, "optim.lr": 1.0, "optim.grad_clip": 0.0}
DOOMED |= {"model.norm": "none", "model.final_norm": "none", "model.act": "relu2"}
DOOMED |= {"diagnostics.every": 0, "diagnostics.warn_window": 8}


@pytest.mark.parametrize("watch", ["all", "residual"])
def test_a_run_that_will_be_lost_is_warned_of_before_its_first_nan(train_tiny, capsys, watch):
    run = train_tiny(**DOOMED, **{"diagnostics.watch": watch})
    assert run.status["status"] == "diverged"
    first = run.status["events"][0]
    assert first["kind"] == "early_warning"
    assert 8 <= first["step"] < run.status["last_step"] - 3
    assert first["text"] in capsys.readouterr().err


def test_the_same_model_at_a_sane_learning_rate_is_not_warned_of(train_tiny):
    run = train_tiny(**DOOMED | {"optim.lr": 1e-3})
    assert (run.status["status"], run.status["events"]) == ("finished", [])


def test_watch_off_says_nothing_at_every_step(train_tiny):
    assert train_tiny(**DOOMED, **{"diagnostics.watch": "off"}).status["events"] == []


def test_most_heads_overloaded_is_an_event_of_the_record_that_shows_it(train_tiny):
    """Attention as even as its initial weights make it, after a warm-up of two steps."""
    run = train_tiny(**QUIET, **{"optim.warmup_steps": 2, "optim.lr": 1e-5, "diagnostics.every": 1})
    assert (run.array("overloaded")[1] == HEADS).all()
    assert [(e["kind"], e["step"], e["layer"]) for e in run.status["events"]] == [("overloaded", 2, 0)]


@pytest.mark.parametrize("policy", ["skip", "log"])
def test_a_run_that_goes_on_says_where_its_first_fault_was(train_tiny, policy):
    inject = {"debug.inject.step": 3, "debug.inject.module": "blocks.1.mlp.act"}
    run = train_tiny(nan_policy=policy, **QUIET, **inject, **{"diagnostics.watch": "all"})
    faults = [e for e in run.status["events"] if e["kind"] == "non_finite"]
    assert [(e["step"], e["layer"]) for e in faults] == [(3, 1)]
    # A skipped step can be run again, with the weights it had; under log they are gone.
    assert ("blocks.1.mlp.act" if policy == "skip" else "in mlp of layer 1") in faults[0]["text"]


def test_going_on_forgets_the_events_of_steps_done_again(train_tiny, monkeypatch):
    settings = {"optim.warmup_steps": 1, "optim.lr": 1e-5, "diagnostics.every": 1, "train.max_steps": 6}
    settings |= {"nan_policy": "skip", "debug.inject.step": 3, "debug.inject.module": "blocks.1"}
    whole = train_tiny("whole", **settings).status["events"]
    assert [e["step"] for e in whole] == [1, 3]
    original = Trainer.train_step

    def interrupted(self, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("stopped", **settings)
    path = load_run("stopped").directory / "run.json"
    status = json.loads(path.read_text())
    stale = {"step": 4, "kind": "early_warning", "layer": 0, "text": "of a step that is done again"}
    path.write_text(json.dumps(status | {"events": [*status["events"], stale]}))
    resumed = train_tiny("stopped", **settings)
    assert resumed.status["started_from_step"] == 4
    assert resumed.status["events"] == whole


def test_a_compiled_deterministic_run_has_one_graph_whatever_it_records(train_tiny, monkeypatch):
    """Statistics in a graph change how the rest of it is fused and rounded; so there is only one graph."""
    graphs = set()
    train_step = Trainer.train_step

    def watching(self, step, due):
        def forward(*args):
            graphs.add((self.recorder.level, tuple(self.recorder.statistics)))
            return self.model(*args)

        self.forward = forward
        return train_step(self, step, due)

    monkeypatch.setattr(Trainer, "train_step", watching)
    nothing = {"diagnostics.watch": "off", "diagnostics.every": 0, "diagnostics.snapshot_every": 0}
    for name, more in {"nothing": nothing, "one": {"diagnostics.statistics": ["peak"]}, "default": {}}.items():
        train_tiny(name, **QUIET, **{"train.compile": True, "train.max_steps": 2}, **more)
    assert graphs == {("record", tuple(name for name in STATISTICS if is_forward(name)))}
    train_tiny("eager", **QUIET, **nothing, **{"train.max_steps": 2})
    assert ("off", tuple(name for name in STATISTICS if is_forward(name))) not in graphs  # snapshots are not kept
    assert len(graphs) == 2

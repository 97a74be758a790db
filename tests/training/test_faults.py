"""Numbers that are not finite never reach the weights, and the run says where they came from."""

import math

import pytest
import torch
from safetensors.torch import load_file

from normfree.cli import run_config
from normfree.errors import EXIT_DIVERGED
from normfree.runs import load_run
from normfree.training.faults import FiniteFlag, LossScaler
from normfree.training.loop import Trainer
from normfree.training.optimizer import build_optimizer, gradient_norms

CPU = torch.device("cpu")


def poison(monkeypatch, *steps, value=float("nan")):
    """Plant `value` in one gradient of the given steps."""
    calls = []

    def poisoned(parameters):
        if len(calls) in steps:
            parameters[-1].grad[0] = value
        calls.append(0)
        return gradient_norms(parameters)

    monkeypatch.setattr("normfree.training.loop.gradient_norms", poisoned)


def weights(path):
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")


def same(one, two):
    return all(a[k].equal(b[k]) for a, b in zip(one, two, strict=True) for k in a if not k.startswith("extra/"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_raise_stops_and_leaves_the_state_before_the_bad_step(train_tiny, tiny, tmp_path, monkeypatch, capsys, value):
    healthy = train_tiny("healthy", **{"train.max_steps": 3})
    poison(monkeypatch, 3, value=value)
    result = run_config(tiny(run_dir=str(tmp_path / "bad")))
    assert (result.status, result.exit_code) == ("diverged", EXIT_DIVERGED)
    run = load_run(tmp_path / "bad")
    assert run.status["last_step"] == 3
    assert "step 3" in run.status["reason"]
    assert [step for step, _ in run.checkpoints] == [2, 3]
    assert same(weights(run.checkpoints[-1][1]), weights(healthy.checkpoints[-1][1]))
    assert run.metrics["step"].max() == 3
    said, readme = (
        capsys.readouterr().err,
        (run.directory / run.status["fault"]["postmortem"] / "README.txt").read_text(),
    )
    assert "diverged" in said
    assert readme.partition("What to try")[2] in said
    assert readme.count("a lower optim.lr") == run.status["reason"].count("a lower optim.lr") == 1


def test_a_diverged_run_is_not_trained_again(train_tiny, monkeypatch, tiny, tmp_path):
    poison(monkeypatch, 3)
    train_tiny()
    assert run_config(tiny(run_dir=str(tmp_path / "run"))).exit_code == EXIT_DIVERGED


def test_skip_leaves_out_exactly_the_bad_step(train_tiny, monkeypatch):
    poison(monkeypatch, 3)
    run = train_tiny(nan_policy="skip", **{"train.checkpoint_every": 1, "train.keep_checkpoints": 9})
    assert run.status["status"] == "finished"
    paths = dict(run.checkpoints)
    assert same(weights(paths[3]), weights(paths[4])), "the bad step changed something"
    assert not same(weights(paths[4]), weights(paths[5])), "the step after it was not applied"
    assert run.metrics.set_index("step")["bad_steps"].dropna().iloc[-1] == 1


def test_log_goes_on_and_the_record_shows_it(train_tiny, monkeypatch):
    poison(monkeypatch, 3)
    run = train_tiny(nan_policy="log", **{"diagnostics.every": 1, "model.norm": "none"})
    assert run.status["status"] == "finished"
    assert (run.nan_counts[:4] == 0).all()
    assert (run.nan_counts[4:, -1] == run.elements["block"][4:]).all()
    assert run.metrics["train/loss"].isna().iloc[-2]


def test_a_run_whose_every_evaluation_is_nan_still_ends_well(train_tiny, monkeypatch, capsys):
    """Under nan_policy=log a collapsed run has nothing finite to report, and reports that."""
    poison(monkeypatch, 0)
    run = train_tiny(nan_policy="log", **{"train.eval_every": 0, "log.figures": True})
    assert run.status["status"] == "finished"
    assert [math.isnan(v) for v in run.series("val/loss")[1]] == [True]
    assert math.isnan(run.series("val/perplexity")[1][-1])
    assert run.status["warnings"] == []
    assert "nan nats a token" in capsys.readouterr().err


def test_a_divergence_names_the_first_bad_block(tiny, tmp_path):
    config = tiny(run_dir=str(tmp_path / "bad"), **{"optim.lr": 900.0, "optim.grad_clip": 0.0, "model.norm": "none"})
    config.train.max_steps = 60
    assert run_config(config).status == "diverged"
    run = load_run(tmp_path / "bad")
    assert "block" in run.status["reason"]
    assert run.entropy_steps[-1] == run.status["last_step"], "the bad step itself is on record"


@pytest.mark.parametrize("policy", ["raise", "skip", "log"])
def test_flag(policy):
    flag = FiniteFlag(policy, CPU)
    good, bad, no = torch.tensor(True), torch.tensor(False), torch.tensor(False)
    masks = []
    for step, verdict in enumerate([good, bad, good, bad, good]):
        flag.judge(verdict, step, no)
        masks.append(flag.mask.item())
    assert masks == {"raise": [0, 1, 1, 1, 1], "skip": [0, 1, 0, 1, 0], "log": [0] * 5}[policy]
    assert flag.first_bad == 1
    assert flag.bad_steps == 2


def test_a_masked_step_changes_neither_weights_nor_moments_nor_step_count(tiny):
    model = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(model, tiny().optim)
    mask = optimizer.found_inf = torch.zeros(())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [t.clone() for p in model.parameters() for t in (p.data, *optimizer.state[p].values())]
    mask.fill_(1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    after = [t for p in model.parameters() for t in (p.data, *optimizer.state[p].values())]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_loss_scale_halves_on_overflow_and_doubles_after_the_interval():
    scaler = LossScaler(True, CPU, start=8.0, interval=2)
    scales = []
    for finite in (False, True, True, True, False):
        overflow = scaler.overflowed(torch.tensor(finite))
        assert overflow == (not finite)
        scaler.move(torch.tensor(finite), overflow, torch.tensor(False))
        scales.append(scaler.scale.item())
    assert scales == [4, 4, 8, 8, 4]
    assert scaler.skipped == 2


def test_fp16_overflow_is_skipped_counted_and_not_a_bad_step(train_tiny, monkeypatch):
    poison(monkeypatch, 1, value=float("inf"))
    run = train_tiny(**{"train.precision": "fp16"})
    assert run.status["status"] == "finished"
    rows = run.metrics.set_index("step")
    assert rows["scaler_skips"].dropna().iloc[-1] == 1
    assert rows["loss_scale"].dropna().iloc[-1] == 2.0**15


def test_fp16_gradients_that_no_scale_can_save_stop_the_run(tiny, tmp_path, monkeypatch):
    """65536 halves sixteen times; at 1 an overflow is no longer the scale's doing."""
    poison(monkeypatch, *range(100), value=float("inf"))
    result = run_config(tiny(run_dir=str(tmp_path / "bad"), **{"train.precision": "fp16", "train.max_steps": 40}))
    assert result.status == "diverged"
    assert load_run(tmp_path / "bad").status["last_step"] == 16


def test_under_log_the_scaler_skips_for_ever_and_the_weights_stay_finite(train_tiny, monkeypatch):
    """As the original's runs did (experiment=paper_nan)."""
    poison(monkeypatch, *range(1, 400), value=float("inf"))
    settings = {"train.precision": "fp16", "train.max_steps": 200, "train.eval_every": 0, "train.checkpoint_every": 0}
    run = train_tiny(nan_policy="log", **settings)
    assert run.status["status"] == "finished"
    assert run.series("scaler_skips")[1][-1] == 199
    assert math.isfinite(run.status["val/loss"])


def test_moments_that_are_not_finite_stop_the_run_at_the_checkpoint(tiny, tmp_path, monkeypatch):
    """Such a weight would never learn again, and no loss would tell."""
    original = Trainer.train_step

    def corrupted(self, *args):
        original(self, *args)
        next(iter(self.optimizer.state.values()))["exp_avg_sq"][0, 0] = float("inf")

    monkeypatch.setattr(Trainer, "train_step", corrupted)
    result = run_config(tiny(run_dir=str(tmp_path / "bad")))
    assert result.status == "diverged"
    assert "moments" in load_run(tmp_path / "bad").status["reason"]


def test_the_bad_step_is_in_the_scalars(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    run_config(tiny(run_dir=str(tmp_path / "bad"), **{"log.every": 100, "diagnostics.every": 0}))
    steps, norms = load_run(tmp_path / "bad").series("grad_norm")
    assert steps.tolist() == [0, 3]
    assert math.isnan(norms[1])


def test_a_rollback_that_is_met_again_is_one_event(train_tiny, monkeypatch):
    """Killed between a rollback and the next checkpoint, a run goes on from before it and takes the same way."""
    settings = {"nan_policy": "rollback", "debug.inject.step": 7, "debug.inject.module": "blocks.1.mlp.fc"}
    settings |= {"train.max_steps": 14, "train.checkpoint_every": 5}
    step = Trainer.train_step

    def killed(self, number, *args):
        if number == 9 and self.rollbacks.leaves_out(7):
            raise RuntimeError("killed")
        return step(self, number, *args)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train_tiny(**settings)
    monkeypatch.setattr(Trainer, "train_step", step)
    events = [event for event in train_tiny(**settings).status["events"] if event["kind"] == "rollback"]
    assert [event["step"] for event in events] == [7]

"""Bad numbers and a machine without memory: what reaches the disk is whole and finite, and says where it went wrong."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import in_child, record
from safetensors.torch import load_file

from normfree.cli import run_config
from normfree.errors import EXIT_DIVERGED, EXIT_MEMORY, UserError
from normfree.runs import load_run
from normfree.training import autopsy
from normfree.training.checkpoint import newest_good
from normfree.training.loop import Trainer
from normfree.training.postmortem import load_postmortem
from normfree.training.replaying import replay

STEP = 1
SITES = {
    "weight": ("forward", "blocks.1.mlp.fc.weight"),
    "batch": ("forward", "blocks.0.attn.proj"),
    "gradient": ("backward", "blocks.0.mlp.fc.weight"),
    "moment": ("optimizer", "blocks.1.attn.proj.weight.exp_avg"),
}
EVERY_STEP = {"train.checkpoint_every": 1, "train.keep_checkpoints": 9, "train.max_steps": 3, "train.eval_every": 0}
EVERY_STEP |= {"train.eval_tokens": 16, "diagnostics.every": 0, "model.dropout.resid": 0.1, "train.micro_batch_size": 4}


def state(run, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and step counts of the checkpoint of `step`."""
    folder = dict(run.checkpoints)[step]
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("extra/")}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors.values())


def said(run) -> str:
    """What run.json says of the fault."""
    events = [e for e in run.status["events"] if e["kind"] in ("rollback", "non_finite") and e["step"] == STEP]
    return " ".join([e["text"] for e in events] + [(run.status.get("fault") or {}).get("text", "")])


def planted(train_tiny, site: str, value: str, policy: str):
    phase, path = SITES[site]
    inject = {"step": STEP, "module": path, "phase": phase, "value": value}
    changes = EVERY_STEP | {f"debug.inject.{name}": v for name, v in inject.items()}
    return train_tiny(f"{site}-{value}-{policy}", nan_policy=policy, **changes)


def check(run, healthy, site: str, value: str, policy: str) -> None:
    phase, path = SITES[site]
    steps = [step for step, _ in run.checkpoints]
    assert steps == list(range(0 if policy == "rollback" else 1, STEP + 1 if policy == "raise" else STEP + 3))
    assert equal(state(run, STEP), state(healthy, STEP))
    assert f"step {STEP}" in said(run)
    if policy == "log":
        assert not finite(state(run, STEP + 1)), "the control: the fault is real, and here it reaches the weights"
        return
    assert all(finite(state(run, step)) for step in steps)
    if policy == "raise":
        fault = run.status["fault"]
        named = (run.status["status"], fault["step"], fault["phase"], fault["module"], fault["value"].lower())
        module = path.removesuffix(".exp_avg").removesuffix(".weight")
        assert named == ("diverged", STEP, phase, module, value)
        return
    assert equal(state(run, STEP + 1), state(healthy, STEP)), "the bad step changed something"
    assert not equal(state(run, STEP + 2), state(healthy, STEP)), "the step after it was not applied"
    assert path in said(run)
    assert phase in said(run)


POLICIES = ("raise", "skip", "rollback", "log")


def test_a_bad_number_changes_nothing_and_is_named(train_tiny):
    """NaN or Inf, at each site under each policy. Under log, the control, the same ones do reach the weights."""
    healthy = train_tiny("healthy", **EVERY_STEP)
    for i, site in enumerate(SITES):
        for j, policy in enumerate(POLICIES):
            value = ("nan", "inf")[(i + j) % 2]
            check(planted(train_tiny, site, value, policy), healthy, site, value, policy)


@pytest.mark.soak
def test_every_bad_number_at_every_site_under_every_policy(train_tiny):
    healthy = train_tiny("healthy", **EVERY_STEP)
    for site in SITES:
        for policy in POLICIES:
            for value in ("nan", "inf", "-inf"):
                check(planted(train_tiny, site, value, policy), healthy, site, value, policy)


def test_a_fault_is_told_though_looking_for_it_fails(tiny, tmp_path, monkeypatch):
    """The traced step needs more memory than the step did: that it diverged is what has to be said."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autopsy, "first_non_finite", full)
    inject = {"debug.inject.step": 3, "debug.inject.module": "blocks.1.mlp.fc"}
    result = run_config(tiny(run_dir=str(tmp_path / "run"), **inject))
    run = load_run(tmp_path / "run")
    assert (result.status, result.exit_code) == ("diverged", EXIT_DIVERGED)
    assert "running the step once more, to say where, failed (OutOfMemoryError" in run.status["reason"]
    assert run.checkpoints[-1][0] == 3
    assert finite(state(run, 3))
    result = run_config(tiny(run_dir=str(tmp_path / "back"), nan_policy="rollback", **inject))
    assert result.status == "finished", "it need not know where to go back"


# -- what is kept of it -----------------------------------------------------------------------------------------------


def test_the_postmortem_of_a_long_run_is_small_and_meets_the_fault_again(train_tiny):
    """64 rows, though there were 71 steps; the checkpoint is links, and all else no larger after a million steps."""
    settings = {"train.max_steps": 72, "train.checkpoint_every": 0, "train.eval_every": 0, "diagnostics.watch": "all"}
    settings |= {"debug.inject.step": 70, "debug.inject.module": "blocks.0.mlp.fc.weight", "optim.lr": 1e-3}
    run = train_tiny(**settings, **{"debug.inject.value": "inf", "diagnostics.every": 50})
    pm = load_postmortem(run.directory)
    result = replay(pm, torch.device("cpu"))
    assert (result.step, result.verdict, result.same_place) == (70, "planted", True)
    assert (result.finding.module, result.finding.phase) == ("blocks.0.mlp.fc", "forward")
    with np.load(pm.directory / "ring.npz") as ring:
        assert ring["step"].tolist() == list(range(7, 71))
        steps, losses = run.series("train/loss")
        np.testing.assert_array_equal(ring["loss"], losses[np.isin(steps, ring["step"])])
        assert all(len(values) == 64 for values in ring.values())
    files = [path for path in pm.directory.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parent.name == "checkpoint"]
    assert len(kept) == 5
    assert all(path.stat().st_nlink > 1 for path in kept)
    assert sum(path.stat().st_size for path in files if path not in kept) < 100_000


# -- out of memory ----------------------------------------------------------------------------------------------------

OOM = {"train.max_steps": 6, "train.checkpoint_every": 2, "model.dropout.resid": 0.1, "train.eval_tokens": 16}
TOO_MUCH = 1 << 50  # bytes


def no_memory_in(phase: str, patch, kind: str) -> None:
    """In `phase` of step 3 there is no memory: `cuda` says so as CUDA's allocator does, `cpu` its own, `python` too."""

    def full() -> None:
        if kind == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if kind == "python":
            bytearray(TOO_MUCH)
        torch.empty(TOO_MUCH, dtype=torch.uint8)

    original = Trainer.train_step

    def train_step(self, step, due):
        if step == 3 and phase == "forward":
            self.model.blocks[1].register_forward_hook(lambda *_: full())
        elif step == 3:
            half = self.parameters[::2]

            def step_half(*args):
                torch._foreach_add_([p.detach() for p in half], 1.0)  # as an optimizer that came half way
                full()

            self.optimizer.step = step_half
        original(self, step, due)

    patch.setattr(Trainer, "train_step", train_step)


def test_out_of_memory_costs_the_steps_since_the_checkpoint(train_tiny, monkeypatch):
    whole = train_tiny("whole", **OOM)
    theirs = record(whole.directory)
    for phase in ("forward", "optimizer"):
        for kind in ("cuda", "cpu", "python"):
            folder = f"{phase}-{kind}"
            with monkeypatch.context() as patch:
                no_memory_in(phase, patch, kind)
                with pytest.raises(UserError, match=r"out of memory: .*\nLower train.micro_batch_size=8") as caught:
                    train_tiny(folder, **OOM)
            assert caught.value.exit_code == EXIT_MEMORY == 77
            run = load_run(folder)
            assert run.status["status"] == "failed"
            assert "out of memory" in run.status["reason"]
            assert newest_good(run.directory)[0] == 2
            assert [step for step, _ in run.checkpoints] == [2], "half a step was saved"
            ours = record(train_tiny(folder, **OOM).directory)
            for name in theirs:
                if name.endswith((".bin", ".safetensors", "metrics.jsonl")):
                    assert ours[name] == theirs[name], (folder, name)

    # The control: a checkpoint of what the optimizer left changes how the run ends.
    with monkeypatch.context() as patch:
        no_memory_in("optimizer", patch, "cpu")
        stopped = Trainer.train_step

        def saving(self, step, due):
            try:
                stopped(self, step, due)
            except RuntimeError:
                self.write_checkpoint(step)
                raise

        patch.setattr(Trainer, "train_step", saving)
        with pytest.raises(UserError, match="out of memory"):
            train_tiny("run", **OOM)
    assert not equal(state(train_tiny("run", **OOM), 6), state(whole, 6))


def test_a_process_whose_memory_is_limited(tiny, tmp_path):
    """RLIMIT_AS: a step a thousand times as large does not fit."""
    changes = {"train.max_steps": 4, "train.checkpoint_every": 1, "diagnostics.every": 0, "train.eval_every": 0}
    original = Trainer.backward_passes

    def limited(self, step, rows, count):
        if step == 2:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
            rows = rows.repeat(1000, axis=0)
        return original(self, step, rows, count)

    def train() -> None:
        Trainer.backward_passes = limited
        with pytest.raises(UserError, match="out of memory") as caught:
            run_config(tiny(run_dir=str(tmp_path / "run"), **changes))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert caught.value.exit_code == EXIT_MEMORY

    assert in_child(train) == 0
    assert newest_good(tmp_path / "run")[0] == 2

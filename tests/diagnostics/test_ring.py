"""The flight recorder: the last steps, in order, and the same numbers as in the record of the run."""

import numpy as np
import pytest
import torch

from normfree.diagnostics import STATISTICS
from normfree.diagnostics.hooks import LEVELS
from normfree.diagnostics.ring import Entry, Ring
from normfree.runs import load_run

CPU = torch.device("cpu")


def filled(length, steps, start=0):
    """A ring to which `steps` rows (step, 10 step) were written."""
    ring = Ring(length, 2, CPU)
    for step in range(start, start + steps):
        ring.write(Entry(step, 0.1, step, "all"), torch.tensor([step, 10.0 * step], dtype=torch.float64))
    return ring


@pytest.mark.parametrize("start", [0, 1, 6])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("length", [1, 4])
def test_it_holds_the_last_steps_in_order(length, steps, start):
    entries, rows = filled(length, steps, start).read(until=10**6)
    expected = list(range(start, start + steps))[-length:]
    assert [entry.step for entry in entries] == expected
    assert rows.tolist() == [[step, 10 * step] for step in expected]
    assert rows.shape == (len(expected), 2)


def test_reading_until_a_step_leaves_out_what_came_after_it():
    """On a GPU the host is two steps ahead of what it knows; what it has overwritten by then is gone, not mixed up."""
    ring = filled(4, 11)
    assert [entry.step for entry in ring.read(until=8)[0]] == [7, 8]
    assert ring.read(until=8)[1].tolist() == [[7, 70], [8, 80]]
    assert ring.read(until=6)[0] == []
    assert ring.read(until=6)[1].shape == (0, 2)


def test_a_row_is_copied():
    ring, row = Ring(2, 1, CPU), torch.ones(1, dtype=torch.float64)
    ring.write(Entry(0, 0.1, 0, "all"), row)
    row.zero_()
    assert ring.read(until=0)[1].tolist() == [[1.0]]


# -- in a run ---------------------------------------------------------------------------------------------------------


def planted(train_tiny, folder="run", **changes):
    """A run that stops at step 6, and the ring of its postmortem."""
    settings = {"debug.inject.step": 6, "debug.inject.module": "blocks.1.mlp.fc", "train.max_steps": 9}
    settings |= {"train.eval_every": 0, "train.checkpoint_every": 0, "diagnostics.probe_sequences": 0}
    settings |= {"optim.schedule": "linear", "optim.warmup_steps": 3, "train.micro_batch_size": 4}
    run = train_tiny(folder, **settings | {"diagnostics.watch": "all", "diagnostics.every": 1} | changes)
    with np.load(run.directory / run.status["fault"]["postmortem"] / "ring.npz") as file:
        return run, dict(file)


def recorded_of(run, name, steps):
    """The array of a run at `steps`; of several sites, those that are measured at every step."""
    found, values = run.array(name)
    sites, every_step = STATISTICS[name].sites, STATISTICS[name].every_step
    values = values[np.searchsorted(found, steps)]
    return values[:, [sites.index(site) for site in every_step]] if len(sites) > 1 else values


@pytest.mark.parametrize("length", [4, 64])
def test_the_ring_of_a_postmortem_says_what_the_run_recorded(train_tiny, length):
    run, ring = planted(train_tiny, **{"diagnostics.ring": length})
    steps = list(range(7))[-length:]
    assert ring["step"].tolist() == steps, "the bad step too, and none after it"
    metrics = run.metrics.set_index("step").loc[steps]
    for name, column in {"loss": "train/loss", "grad_norm": "grad_norm", "lr": "lr"}.items():
        assert np.array_equal(ring[name], metrics[column], equal_nan=True), name
    assert len(set(ring["lr"][-3:])) == 3, "a constant would be equal by chance"
    watched = [name for name in STATISTICS if getattr(STATISTICS[name], "every_step", ())]
    assert watched
    for name in watched:
        assert np.array_equal(ring[name], recorded_of(run, name, steps), equal_nan=True), name
    assert np.isfinite(ring["resid_max"][:-1]).all()
    assert np.isnan(ring["resid_max"][-1]).tolist() == [False, True], "the fault was planted in the upper block"
    assert ring["first_bad"].tolist() == [-1] * (len(steps) - 1) + [6]


def test_steps_without_a_record_are_in_the_ring_as_the_recorded_ones_would_be(train_tiny):
    _, everything = planted(train_tiny, "one")
    _, watched = planted(train_tiny, "two", **{"diagnostics.every": 0})
    assert (everything.pop("level") == LEVELS.index("record")).all()
    assert (watched.pop("level") == LEVELS.index("all")).all()
    assert everything.keys() == watched.keys()
    for name, values in everything.items():
        assert np.allclose(watched[name], values, rtol=1e-6, atol=0, equal_nan=True), name


@pytest.mark.parametrize("watch", ["residual", "off"])
def test_what_was_not_measured_is_not_given_as_a_number(train_tiny, watch):
    _, ring = planted(train_tiny, **{"diagnostics.watch": watch, "diagnostics.every": 0})
    assert np.isfinite(ring["loss"][:-1]).all()
    if watch == "off":
        assert not set(ring) & set(STATISTICS) - {"grad_norm"}  # the norm over all parameters, known at every step
    else:
        assert np.isfinite(ring["resid_max"][:-1]).all()
        for name in ("attn_entropy", "max_score", "peak"):
            assert np.isnan(ring[name]).all(), name


def test_a_run_that_goes_on_has_no_postmortem(train_tiny):
    run = train_tiny(nan_policy="skip", **{"debug.inject.step": 3, "debug.inject.module": "blocks.1.mlp.fc"})
    assert not (load_run(run.directory).directory / "postmortem").exists()

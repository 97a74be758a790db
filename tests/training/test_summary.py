"""What is said when training ends: the true last loss, and paths and commands that can be copied."""

from normfree.training.summary import training_loss

FEW = {"train.max_steps": 4, "train.eval_every": 0, "diagnostics.every": 0, "log.every": 10}


def test_the_last_training_loss_is_that_of_the_last_step(train_tiny, capsys):
    logged = train_tiny("all", **FEW | {"log.every": 1}).series("train/loss")[1]
    capsys.readouterr()
    train_tiny("few", **FEW)
    assert f"{logged[0]:.3f} -> {logged[-1]:.3f} nats a token" in capsys.readouterr().err


def test_a_last_loss_that_is_not_the_end_says_of_which_step_it_is(train_tiny):
    """A run that only had its last checkpoint left to write has trained no step, and knows what was logged."""
    run = train_tiny(**FEW | {"log.every": 3})
    losses = run.series("train/loss")[1]
    assert training_loss(run, None) == f"{losses[0]:.3f} -> {losses[-1]:.3f} (at step 3) nats a token"


def test_the_run_directory_and_the_command_are_printed_whole(train_tiny, capsys):
    run = train_tiny("a-name-of-" + "many-words-" * 9 + "s1", **FEW)
    lines = capsys.readouterr().err.splitlines()
    assert f"written to: {run.directory}" in lines
    assert f"look through it: python -m normfree.report {run.directory}" in lines
    assert any(line.endswith(f"; {run.directory}") for line in lines), "the first line"
    assert not any("…" in line for line in lines)

"""What a run does and leaves behind."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from normfree import load_model, load_run, load_runs
from normfree.data.tokenizer import load_tokenizer
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.model.losses import CrossEntropy
from normfree.training import checkpoint as ckpt
from normfree.training import faults
from normfree.training.loop import Trainer


def test_learns(train_tiny):
    choices = {"model.norm": "none", "model.act": "relu", "model.init.std": 0.02}
    run = train_tiny(**choices, **{"train.max_steps": 60, "train.eval_every": 0})
    losses = run.metrics["val/loss"].dropna()
    train = run.metrics["train/loss"].dropna()
    assert train.iloc[0] == pytest.approx(math.log(257), abs=0.1), "an untrained model knows nothing"
    assert losses.iloc[-1] < train.iloc[0] - 2
    assert run.metrics["val/perplexity"].dropna().iloc[-1] == pytest.approx(math.exp(losses.iloc[-1]))


def test_a_first_loss_is_written_before_the_next_step_is_compiled(train_tiny, monkeypatch):
    """The host is two steps behind a GPU; but compiling takes long, and whoever waits wants to see something."""
    written = []
    box, step = faults.Mailbox.__init__, Trainer.train_step

    def behind(self, device):
        box(self, device)
        self.lag = faults.LAG

    def counted(self, *args):
        path = self.run_dir / "metrics.jsonl"
        written.append(path.read_text().count("train/loss") if path.exists() else 0)
        return step(self, *args)

    monkeypatch.setattr(faults.Mailbox, "__init__", behind)
    monkeypatch.setattr(Trainer, "train_step", counted)
    train_tiny(**{"train.eval_every": 0, "train.checkpoint_every": 0})
    assert written == [0, 1, 2, 2, 2, 3], "with a record, without one, and then two steps behind"


def test_accumulation_changes_the_sum_not_the_gradient(train_tiny):
    smooth = {"train.max_steps": 2, "optim.eps": 0.1}  # else AdamW blows rounding of tiny gradients up to steps of lr
    whole = train_tiny("whole", **smooth)
    parts = train_tiny("parts", **smooth, **{"train.micro_batch_size": 2})
    one, two = (load_file(run.checkpoints[-1][1] / "model.safetensors") for run in (whole, parts))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    losses = [run.metrics["train/loss"].dropna().tolist() for run in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert parts.entropy == pytest.approx(whole.entropy, abs=1e-4)
    assert (parts.elements["block"] == whole.elements["block"]).all()


def test_evaluation_at_a_step_is_of_the_checkpoint_of_that_step(train_tiny):
    run = train_tiny()
    step, path = run.checkpoints[-1]
    from normfree.data.batches import evaluation_rows
    from normfree.data.packing import prepare
    from normfree.training.evaluation import evaluate_loss

    rows = evaluation_rows(prepare(run.config.data).tokens("val"), 16, 256, None)
    loss = evaluate_loss(load_model(path), rows, 8, "fp32")
    assert run.metrics.set_index("step").loc[step, "val/loss"] == loss


@pytest.mark.parametrize("fast", [True, False])
def test_evaluation_takes_the_paths_that_training_takes(train_tiny, monkeypatch, fast):
    """It took the plain one: logits of a whole micro-batch in fp32, which needed more memory than training did."""
    evaluate, taken = Trainer.evaluate, []

    def watched(self, step, record):
        self.fast = fast
        with monkeypatch.context() as patch:
            patch.setattr(CrossEntropy, "__call__", lambda loss, *rest: taken.append(loss.fast) or plain(loss, *rest))
            evaluate(self, step, record)
        self.fast = False

    plain = CrossEntropy.__call__
    monkeypatch.setattr(Trainer, "evaluate", watched)
    train_tiny()
    assert set(taken) == {fast}


def test_the_run_directory_is_complete(train_tiny):
    run = train_tiny(**{"log.tensorboard": True, "log.figures": True})
    names = {path.name for path in run.directory.iterdir()}
    expected = "config.yaml run.json metrics.jsonl arrays tensorboard checkpoints figures tokenizer"
    assert set(expected.split()) <= names
    assert run.status["warnings"] == []
    assert run.entropy.shape == (3, 2, 2)
    assert run.probe_entropy.shape == (4, 2, 2), "the probe sees the final weights as well"
    assert run.nan_counts.shape == (3, 2)
    assert run.elements["attn_probs"].tolist() == [8 * 2 * 16 * 16] * 3
    assert run.array("grad_norm")[1].shape == (3, 2)
    for line in (run.directory / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert load_tokenizer(run.directory / "tokenizer").decode([104, 105]) == "hi"
    assert run.status["parameters"]["total"] == sum(p.numel() for p in load_model(run.directory).parameters())
    assert len(list((run.directory / "figures").glob("*.png"))) >= 4
    assert len(list((run.directory / "tensorboard").iterdir())) == 1, "hparams stand in the same event file"


def test_learned_slopes_are_recorded(train_tiny):
    for scope, shape in (("global", (3, 1)), ("per_layer", (3, 2))):
        run = train_tiny(scope, **{"model.act": "learnable_leaky_relu", "model.act_scope": scope})
        steps, slopes = run.array("act_slope")
        assert slopes.shape == shape
        assert slopes[0] == pytest.approx(0.01)
        assert (slopes[-1] != slopes[0]).all()


def test_load_runs_is_one_tidy_frame(train_tiny, tmp_path):
    train_tiny("a")
    train_tiny("b", **{"model.act": "relu"})
    frame = load_runs(str(tmp_path / "*"))
    assert set(frame["model.act"]) == {"gelu_tanh", "relu"}
    assert {"step", "train/loss", "val/loss", "seed", "run"} <= set(frame.columns)


def test_a_vocabulary_larger_than_the_tokenizer_s_is_never_drawn_from(train_tiny, capsys):
    """Ids that no token has cannot be decoded: the sample at the end made a failed run of a finished one."""
    run = train_tiny(**{"model.vocab_size": 320, "model.vocab_used": 320, "optim.lr": 1e-9})
    assert run.status["status"] == "finished"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_never_loaded(train_tiny, damage):
    run = train_tiny()
    (_, older), (_, newest) = run.checkpoints
    path = newest / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged") as caught:
        load_model(newest)
    assert caught.value.exit_code == EXIT_CHECKPOINT
    assert ckpt.find_checkpoint(run.directory) == older, "a run falls back to the newest good one"


def test_pruning_keeps_the_last_good_checkpoint(train_tiny):
    run = train_tiny(**{"train.keep_checkpoints": 3})
    for _, path in run.checkpoints[1:]:
        (path / "model.safetensors").write_bytes(b"")
    first = run.checkpoints[0][1]
    ckpt.prune(run.directory, keep=1)
    assert first in [path for _, path in load_run(run.directory).checkpoints]


def test_diagnostics_off_records_nothing_and_the_summary_says_so(train_tiny, capsys):
    run = train_tiny(**{"diagnostics.every": 0})
    assert run.array_names == []
    assert "not recorded" in capsys.readouterr().err


def test_original_chunks_train(train_tiny):
    run = train_tiny(**{"data.chunks": "original"})
    assert run.status["status"] == "finished"


def test_a_failing_view_never_ends_a_run(train_tiny, monkeypatch):
    from normfree.training import views

    def broken(self, *args):
        raise OSError("disk full")

    monkeypatch.setattr(views.TensorBoard, "scalars", broken)
    with pytest.warns(UserWarning, match="disk full"):
        run = train_tiny(**{"log.tensorboard": True})
    assert run.status["status"] == "finished"
    assert "disk full" in run.status["warnings"][0]


class FakeWandb:
    """What `views.WeightsAndBiases` uses of the library, keeping what it is given."""

    def __init__(self):
        self.rows, self.summary, self.settings = [], {}, {}

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.rows.append("finished")


def test_weights_and_biases_gets_the_same_numbers(train_tiny, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = train_tiny(**{"log.wandb": "offline"})
    assert fake.settings["mode"] == "offline"
    losses = {step: row["train/loss"] for step, row in fake.rows[:-1] if "train/loss" in row}
    assert list(losses.values()) == run.series("train/loss")[1].tolist()
    assert any("attn_entropy/layer_1" in row for _, row in fake.rows[:-1])
    assert fake.rows[-1] == "finished"


def test_without_weights_and_biases_the_run_goes_on(train_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="WeightsAndBiases is left out"):
        run = train_tiny(**{"log.wandb": "offline"})
    assert run.status["status"] == "finished"


def test_a_probe_larger_than_the_validation_text_counts_what_it_saw(train_tiny):
    run = train_tiny(**{"diagnostics.probe_sequences": 100_000})
    steps, elements = run.array("probe_elements")
    assert elements[0, 0] % (16 * 16) == 0
    assert elements[0, 0] < 100_000 * 16 * 16


def test_out_of_memory_is_a_message(train_tiny, monkeypatch):
    from normfree.training.loop import Trainer

    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(UserError, match=r"train.micro_batch_size=8"):
        train_tiny()


def test_bits_per_byte_are_of_the_text_that_was_evaluated(train_tiny):
    """With one byte a token, and end-of-text for none, bits per byte follow from the tokens alone."""
    from normfree.data.batches import evaluation_rows
    from normfree.data.packing import prepare

    run = train_tiny()
    targets = evaluation_rows(prepare(run.config.data).tokens("val"), 16, 256, None)[:, 1:]
    text = (targets != 256).sum() / targets.size
    loss, bits = run.series("val/loss")[1][-1], run.series("val/bits_per_byte")[1][-1]
    assert bits == pytest.approx(loss / math.log(2) / text)


def test_an_error_of_the_system_keeps_its_name(train_tiny, monkeypatch):
    from normfree.training.loop import Trainer

    def missing(self, *args):
        raise FileNotFoundError("no C compiler")

    monkeypatch.setattr(Trainer, "train_step", missing)
    with pytest.raises(FileNotFoundError, match="no C compiler"):
        train_tiny()


def test_names_with_brackets_are_only_names(train_tiny):
    assert train_tiny(name="a[bold]c[red").status["status"] == "finished"

"""What must hold on a CUDA device: python -m pytest -m gpu -n 0 tests/gpu"""

import time

import pytest
import torch
from safetensors.torch import load_file

from normfree.cli import run_config
from normfree.config import ModelConfig
from normfree.diagnostics import Recorder, attention_entropy
from normfree.measure import position_losses
from normfree.model import Transformer, init_weights
from normfree.runs import load_run
from normfree.training.loop import Trainer
from normfree.training.optimizer import gradient_norms
from normfree.training.record import Due

pytestmark = pytest.mark.gpu
CUDA = {"train.device": "cuda", "train.compile": False, "train.precision": "fp32"}


def float64(q, k):
    scores = q.double() @ k.double().transpose(-1, -2) * q.size(-1) ** -0.5
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [1, 50, 500])
def test_entropy(largest, dtype):
    q, k = torch.randn(2, 2, 3, 257, 64, device="cuda")
    q = (q * (largest / (q @ k.transpose(-1, -2) / 8).abs().max())).to(dtype)
    k = k.to(dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (attention_entropy(q, k) - float64(q, k)).abs().max() < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_hooks_see_what_eager_hooks_see(precision):
    """One graph with statistics, one without, no break; a bad count would raise."""
    model = Transformer(ModelConfig(norm="none", act="relu", vocab_size=512, block_size=128)).cuda()
    init_weights(model, 0)
    recorder = Recorder(model, ["attn_entropy", "nan_count", "inf_count"])
    compiled = torch.compile(model, fullgraph=True)
    idx = torch.randint(0, 512, (4, 128), device="cuda")
    arrays = []
    for forward in (model, compiled):
        for _ in range(2):
            recorder.start()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
                forward(idx, idx).sum.backward()
            arrays.append(recorder.unpack(recorder.stop().cpu()))
            forward(idx, idx).sum.backward()
    for name in arrays[0]:
        for other in arrays[1:]:
            assert other[name] == pytest.approx(arrays[0][name], abs=1e-3)
    assert recorder.passes[1] == 1, "switched off, the compiled step still wrote"


def test_a_step_never_waits_for_the_device(tiny, tmp_path):
    """Ten training steps, a record at each, under a mode in which any blocking transfer is an error."""
    from normfree.config import resolve, resolve_vocabulary
    from normfree.data.packing import prepare

    config = resolve(tiny(**CUDA))
    corpus = prepare(config.data)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    trainer = Trainer(config, corpus, tmp_path, torch.device("cuda"))
    for step in range(3):
        trainer.train_step(step, Due(True, True, trainer.probe(snapshot=True)))
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(3, 13):
            trainer.train_step(step, Due(True, True, trainer.probe(snapshot=True)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_the_host_runs_ahead_and_the_weights_are_exact(train_tiny, tiny, tmp_path, monkeypatch, policy):
    """A NaN gradient at step 3 is known to the host two steps later; nothing of it, or of them, is in the weights."""
    settings = CUDA | {"train.max_steps": 8, "train.checkpoint_every": 3, "train.keep_checkpoints": 9}
    healthy = train_tiny("healthy", **settings | {"train.max_steps": 3})
    calls = []

    def poisoned(parameters):
        if len(calls) == 3:
            parameters[-1].grad[0] = float("nan")
        calls.append(0)
        return gradient_norms(parameters)

    monkeypatch.setattr("normfree.training.loop.gradient_norms", poisoned)
    result = run_config(tiny(run_dir=str(tmp_path / "bad"), nan_policy=policy, **settings))
    run = load_run(result.run_dir)
    if policy == "skip":
        assert run.status["status"] == "finished"
        assert run.metrics["bad_steps"].dropna().iloc[-1] == 1
        return
    assert run.status["status"] == "diverged"
    assert run.status["last_step"] == run.checkpoints[-1][0] == run.metrics["step"].max() == 3
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(r.checkpoints[-1][1] / f"{name}.safetensors") for r in (run, healthy))
        assert all(ours[k].equal(theirs[k]) for k in ours if not k.startswith("extra/"))


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_resume_is_bit_exact(train_tiny, monkeypatch, compiled):
    settings = CUDA | {"train.deterministic": True, "train.compile": compiled, "train.precision": "bf16"}
    settings |= {"model.dropout.resid": 0.1, "model.norm": "none"}
    whole = train_tiny("whole", **settings)
    original = Trainer.train_step

    def stopped(self, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("stopped", **settings)
    again = train_tiny("stopped", **settings)
    one, two = (run.checkpoints[-1][1] / "model.safetensors" for run in (whole, again))
    assert one.read_bytes() == two.read_bytes()
    assert (again.entropy == whole.entropy).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns(train_tiny, precision):
    run = train_tiny(**CUDA | {"train.precision": precision, "train.max_steps": 60, "train.compile": "auto"})
    assert run.metrics["train/loss"].dropna().iloc[-1] < run.metrics["train/loss"].iloc[0] - 1.5


def test_loss_by_position_takes_about_as_long_as_the_loss():
    """It took 500 times as long: where classes are not the last dimension, one thread has all of a position's."""
    model = Transformer(ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=128, vocab_size=32000)).cuda()
    init_weights(model, 0)
    idx, targets = (torch.randint(0, 32000, (8, 128), device="cuda") for _ in range(2))

    def seconds(run):
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    with torch.no_grad():
        each = seconds(lambda: position_losses(model, model.hidden(idx), targets))
        assert each < 20 * seconds(lambda: model(idx, targets))


def test_evaluation_needs_no_more_memory_than_training(train_tiny, monkeypatch):
    """A vocabulary that dwarfs the model: its logits are what there is to hold, 1.5 GiB in fp32."""
    evaluate, peaks = Trainer.evaluate, {"training": [], "evaluation": []}

    def peak():
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def watched(self, step, record):
        peaks["training"].append(peak())
        evaluate(self, step, record)
        peaks["evaluation"].append(peak())

    monkeypatch.setattr(Trainer, "evaluate", watched)
    large = {"model.vocab_size": 50304, "train.batch_size": 512, "train.max_steps": 3, "train.eval_every": 1}
    train_tiny(**CUDA | large | {"train.precision": "bf16", "train.eval_tokens": 512 * 16})
    # The first step makes the optimizer's moments, and reaches its peak before they are there.
    assert len(peaks["evaluation"]) > 2
    assert max(peaks["evaluation"]) <= 1.02 * max(peaks["training"]), peaks

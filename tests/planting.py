"""Faults planted at random sites by `debug.inject`, for the tests on the CPU and on a GPU."""

import random
from pathlib import Path

from normfree.cli import run_config
from normfree.config import ModelConfig
from normfree.diagnostics.finding import Finding
from normfree.diagnostics.inject import running_modules
from normfree.model import Transformer, init_weights
from normfree.runs import load_run
from normfree.training.postmortem import load_postmortem

GPT2 = {"model.norm": "layernorm"}
NORMFREE = {"model.norm": "none", "model.act": "gelu", "model.positions": "rotary", "model.rotary_pct": 0.5}
NORMFREE |= {"model.parallel_residual": True, "model.tie_embeddings": False}
SHORT = {"train.max_steps": 4, "train.eval_every": 0, "train.checkpoint_every": 0, "diagnostics.every": 0}
SHORT |= {"train.eval_tokens": 16}


def sites(number, seed=0):
    """`number` of (model's settings, phase, path, step, value), a fourth each of weights, activations, gradients
    (of outputs and of weights) and moments."""
    draw = random.Random(seed)
    kinds = []
    for settings in (GPT2, NORMFREE):
        shape = {name.removeprefix("model."): value for name, value in settings.items()}
        model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=320, **shape))
        init_weights(model, 0)
        modules, parameters = running_modules(model), [name for name, _ in model.named_parameters()]
        moments = [f"{name}.{moment}" for name in parameters for moment in ("exp_avg", "exp_avg_sq")]
        kinds.append(
            [("forward", parameters), ("forward", modules), ("backward", modules + parameters), ("optimizer", moments)]
        )
    for i in range(number):
        which = draw.randrange(2)
        phase, paths = kinds[which][i % 4]
        yield (GPT2, NORMFREE)[which], phase, draw.choice(paths), draw.randint(1, 3), draw.choice(("nan", "inf"))


def planted_run(tiny, directory, settings, phase, path, step, value, **more):
    """Train with the fault; returns the opened postmortem, or None where the run did not stop at that step."""
    inject = {"step": step, "module": path, "phase": phase, "value": value}
    changes = SHORT | settings | {f"debug.inject.{name}": v for name, v in inject.items()} | more
    run = load_run(run_config(tiny(run_dir=str(directory), **changes)).run_dir)
    fault = run.status.get("fault")
    if run.status["status"] != "diverged" or fault["postmortem"] is None or fault["step"] != step:
        return None
    return load_postmortem(Path(directory) / fault["postmortem"])


def names(finding: Finding | None, phase: str, path: str, value: str) -> bool:
    """Whether `finding` names exactly the planted fault."""
    if finding is None:
        return False
    return (finding.phase, finding.site, finding.value.lower(), finding.count) == (phase, path, value, 1)

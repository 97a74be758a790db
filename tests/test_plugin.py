"""examples/plugin.py: a norm and a statistic from outside, as a user runs them."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from normfree import cli, load_model, load_run
from normfree.config import ModelConfig
from normfree.diagnostics import Recorder
from normfree.errors import EXIT_CONFIG, UserError
from normfree.model import Transformer, init_weights
from normfree.plugins import load_plugin, load_plugins
from normfree.tables import ACTIVATIONS, NORMS, STATISTICS

ROOT = Path(cli.__file__).parent.parent
PLUGIN = ROOT / "examples" / "plugin.py"
CHOICES = ["model.norm=max_abs", "diagnostics.statistics=[attn_entropy,resid_median]"]
SMALL = [
    "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "train.batch_size=4",
    "train.eval_tokens=64", "train.max_steps=2", "diagnostics.every=1", "diagnostics.probe_sequences=1",
    "log.figures=false", "log.tensorboard=false", "data=files", "data.tokenizer=bytes",
]  # fmt: skip


@pytest.fixture
def small(text_folder: Path) -> list[str]:
    return [*SMALL, f"data.path={text_folder}"]


def forget() -> None:
    """As in a process that has not seen the plug-in."""
    for table, name in ((NORMS, "max_abs"), (STATISTICS, "resid_median")):
        if name in table:
            table.remove(name)
    cli._plugins.clear()


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(cli.PLUGINS_VARIABLE, "")
    yield
    forget()


@pytest.fixture
def command(small: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    return lambda *words: cli.main([*words, "run_dir=r", *small])


def test_it_is_short() -> None:
    assert len(PLUGIN.read_text().splitlines()) <= 20


def test_the_run_trains_with_both_and_records_whose_code_it_was(command: Callable[..., int]) -> None:
    assert command("--plugin", str(PLUGIN), *CHOICES) == 0
    run = load_run("r")
    assert run.status["plugins"] == [
        {"path": str(PLUGIN), "sha256": hashlib.sha256(PLUGIN.read_bytes()).hexdigest()},
    ]
    steps, rms = run.array("resid_median")
    assert steps.tolist() == [0, 1]
    assert run.info("resid_median").axes == ("layer",)
    assert rms.shape == (2, 2)
    assert (rms > 0).all()
    assert run.has("probe_resid_median")
    assert type(load_model("r").blocks[0].norm_1).__name__ == "MaxAbs"


COMPILED = """
from __future__ import annotations
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from normfree import register_activation
from normfree.model.activations import Activation

@dataclass
class Shape:
    sharpness: float = 1.0

@register_activation("softplus")
class Softplus(Activation):
    def forward(self, x):
        return F.softplus(x, Shape().sharpness)
"""


def test_a_plug_in_s_own_names_are_found_when_it_is_compiled(tmp_path: Path) -> None:
    """Dynamo asks for the module by name, and so do dataclasses; it used to be in no table of modules."""
    (tmp_path / "plug:in.py").write_text(COMPILED)
    load_plugin(tmp_path / "plug:in.py")
    try:
        act = ACTIVATIONS["softplus"](ModelConfig())
        x = torch.linspace(-2, 2, 8)
        assert torch.compile(act, fullgraph=True, backend="aot_eager")(x) == pytest.approx(torch.log1p(x.exp()))
    finally:
        ACTIVATIONS.remove("softplus")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\ndef f(:\n", "line 2: SyntaxError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\n\n1 / 0\n", "line 3: ZeroDivisionError"),
    ],
)
def test_a_plug_in_that_cannot_be_run_is_a_message(
    code: str, said: str, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(code)
    assert command("--plugin", str(tmp_path / "mine.py")) == EXIT_CONFIG
    shown = capsys.readouterr().err
    assert f"mine.py, {said}" in shown
    assert "Traceback" not in shown


def test_a_run_with_a_plug_in_is_resumed_with_it(
    command: Callable[..., int], small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it there were three lines of unknown choices, and none that said what was missing."""
    assert command("--plugin", str(PLUGIN), *CHOICES) == 0
    forget()
    assert cli.main(["resume=r", "train.max_steps=3"]) == EXIT_CONFIG
    assert f"give the same files, with the contents they had: --plugin {PLUGIN}\n" in capsys.readouterr().err
    assert cli.main(["--plugin", str(PLUGIN), "resume=r", "train.max_steps=3"]) == 0


def test_a_plug_in_that_is_named_twice_is_loaded_once() -> None:
    assert len(load_plugins([PLUGIN, str(PLUGIN)])) == 1


def test_the_norm_and_the_statistic_do_what_they_say() -> None:
    load_plugin(PLUGIN)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64, norm="max_abs"))
    init_weights(model, 0)
    seen: dict[str, list[torch.Tensor]] = {"norm": [], "block": []}
    for block in model.blocks:
        block.norm_1.register_forward_hook(lambda m, args, out: seen["norm"].append(out))
        block.register_forward_hook(lambda m, args, out: seen["block"].append(out))
    recorder = Recorder(model, ["resid_median"])
    recorder.start()
    with torch.no_grad():
        model(torch.arange(16)[None])
    recorded = recorder.unpack(recorder.stop())["resid_median"]
    for out in seen["norm"]:
        assert out.abs().amax(-1) == pytest.approx(1, abs=0.01)
    assert recorded == pytest.approx(np.array([out.abs().median().item() for out in seen["block"]]))


def test_a_parallel_sweep_loads_it_in_every_worker(small: list[str]) -> None:
    """In a process of its own, as a user types it: workers inherit nothing but the environment."""
    words = ["-m", *CHOICES[1:], "model.norm=max_abs,none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--plugin", str(PLUGIN), *words, *small], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = [load_run(path) for path in sorted(Path("runs").glob("*-s1"))]
    assert [run.config.model.norm for run in runs] == ["max_abs", "none"]
    assert all(run.has("resid_median") and len(run.status["plugins"]) == 1 for run in runs)


def test_without_the_plug_in_the_missing_choice_is_named(command: Callable[..., int], capfd) -> None:
    assert command(*CHOICES) == EXIT_CONFIG
    error = capfd.readouterr().err
    assert "unknown choice 'max_abs'" in error
    assert "unknown statistic 'resid_median'" in error
    assert not Path("r").exists()


def test_a_group_of_files_says_how_to_type_ones_own(command: Callable[..., int], capfd) -> None:
    assert command("--plugin", str(PLUGIN), "norm=max_abs") == EXIT_CONFIG
    assert "model.norm=max_abs" in capfd.readouterr().err


def test_a_run_can_be_read_without_the_plug_in_but_its_model_cannot(command: Callable[..., int]) -> None:
    assert command("--plugin", str(PLUGIN), *CHOICES) == 0
    forget()
    run = load_run("r")
    assert run.config.model.norm == "max_abs"
    assert run.array("resid_median")[1].shape == (2, 2)
    with pytest.raises(UserError, match=r"unknown norm 'max_abs'.*--plugin FILE"):
        load_model("r")
    load_plugin(PLUGIN)
    load_model("r")

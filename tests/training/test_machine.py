"""What a run takes of the machine, and what it says of it before it begins."""

from types import SimpleNamespace

import pytest
import torch

from normfree.config import Config, resolve
from normfree.training import machine, session

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("can_build", [True, False])
def test_kernels_are_built_where_they_can_be(monkeypatch, can_build):
    monkeypatch.setattr(machine, "can_build", lambda: can_build)
    config = Config()
    config.train.precision = "bf16"
    assert machine.choose_compile(config, CUDA) == machine.choose_fast(config, CUDA) == can_build
    assert not machine.choose_compile(config, CPU)
    assert not machine.choose_fast(config, CPU)
    config.train.compile, config.train.precision = True, "fp16"
    assert machine.choose_compile(config, CUDA)  # asked for: it fails loudly
    assert not machine.choose_fast(config, CUDA)


def begun(**settings):
    config = resolve(Config())
    for name, value in settings.items():
        setattr(config.train, name, value)
    return SimpleNamespace(config=config, device=torch.device(config.train.device), compiled=False, fast=False)


def test_the_first_line_says_which_paths_are_taken():
    trainer = begun(device="cuda", precision="bf16")
    assert session._machine(trainer) == "cuda, bf16"
    trainer.compiled = trainer.fast = True
    assert session._machine(trainer) == "cuda, bf16, compiled, fused kernels"


def test_a_job_for_a_gpu_is_no_surprise_on_a_cpu():
    large = {"max_steps": 32260, "batch_size": 512}
    found = session._long_on_a_cpu(begun(device="cpu", **large), 124_000_000, 0)
    assert found is not None
    assert "4,369 hours" in found  # 6 x 124e6 x 32260 x 512 x 128 / 1e11 / 3600
    assert session._long_on_a_cpu(begun(device="cuda", **large), 124_000_000, 0) is None
    assert session._long_on_a_cpu(begun(device="cpu", **large), 124_000_000, 32259) is None  # all but done
    assert session._long_on_a_cpu(begun(device="cpu"), 1_000_000, 0) is None  # the default job

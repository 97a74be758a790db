"""What a run takes of the machine, and what it says of it before it begins."""

import os
from types import SimpleNamespace

import pytest
import torch

from normfree import plugins
from normfree.config import Config, resolve
from normfree.kernels import attention
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


class Packed(torch.nn.Module):
    def forward(self, qkv):
        return attention.packed_attention(qkv, 2, 0.5)[0].sum()


def test_a_changed_gradient_of_an_operator_is_not_taken_from_the_compile_cache(monkeypatch, tmp_path):
    """As after an update of the code: PyTorch's own key does not see it, which is the control."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    qkv = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(code):
        monkeypatch.setattr(machine, "compiled_code", lambda: code)
        torch.compiler.reset()
        return torch.autograd.grad(machine.compiled(Packed(), True)(qkv), qkv)[0]

    before = gradient("old")
    operator, keep = attention._packed_attention, attention._save
    try:
        operator.register_autograd(lambda ctx, *g: (2 * attention._gradient(ctx, *g)[0], None, None, None),
                                   setup_context=keep)  # fmt: skip
        assert torch.equal(gradient("old"), before)
        assert torch.equal(gradient("new"), 2 * before)
    finally:
        operator.register_autograd(attention._gradient, setup_context=keep)
        torch.compiler.reset()


def test_processes_that_compile_have_the_same_key_and_nothing_else_has(monkeypatch):
    monkeypatch.setattr(machine, "USERS_TAG", "mine")
    for own in (None, "mine"):
        monkeypatch.delenv(machine.KEY_TAG, raising=False)
        if own is not None:
            monkeypatch.setenv(machine.KEY_TAG, own)
        with machine.process_flags(False):
            for _ in range(2):
                machine.compiled(torch.nn.Identity(), True)
                found = os.environ[machine.KEY_TAG]
                assert found == torch.compiler.config.cache_key_tag == "mine" + machine.compiled_code()
        assert os.environ.get(machine.KEY_TAG) == own


def test_the_caches_key_changes_with_the_code_and_with_plug_ins(monkeypatch, tmp_path):
    before = machine.compiled_code()
    assert machine.compiled_code() == before
    monkeypatch.setitem(plugins.loaded, "mine.py", "0" * 64)
    assert machine.compiled_code() != before
    for folder in ("diagnostics", "kernels", "model"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text("")
    monkeypatch.setattr(machine.normfree, "__file__", str(tmp_path / "__init__.py"))
    empty = machine.compiled_code()
    (tmp_path / "kernels" / "x.py").write_text("changed")
    assert machine.compiled_code() != empty

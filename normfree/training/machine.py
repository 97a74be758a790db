"""The machine a run gets: device, precision, compilation and determinism."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.compiler.config
from torch import nn

import normfree
from normfree import plugins
from normfree.config import Config
from normfree.errors import UserError
from normfree.kernels import can_build

KEY_TAG = "TORCH_COMPILE_CACHE_KEY_TAG"  # part of the keys of PyTorch's compile caches
USERS_TAG = os.environ.get(KEY_TAG, "")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(config: Config) -> torch.device:
    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but PyTorch sees no CUDA device here. Use train.device=auto or cpu.")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def choose_precision(config: Config, device: torch.device) -> str:
    if config.train.precision != "auto":
        return config.train.precision
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if supported else "fp32"


def choose_deterministic(config: Config, device: torch.device) -> bool:
    return device.type == "cpu" if config.train.deterministic is None else config.train.deterministic


def choose_watch(config: Config, device: torch.device) -> str:
    """Entropy at every step where it costs about 2 % of one (CUDA); on the CPU it costs 15 %, the residual nothing."""
    return config.diagnostics.watch or ("all" if device.type == "cuda" else "residual")


def choose_compile(config: Config, device: torch.device) -> bool:
    """auto: where it pays and can work, which is CUDA with what builds kernels."""
    wanted = str(config.train.compile).lower()
    return device.type == "cuda" and can_build() if wanted == "auto" else wanted == "true"


def choose_fast(config: Config, device: torch.device) -> bool:
    """The operators of `normfree.kernels` are for bf16 on CUDA; elsewhere everything is exact as it is."""
    on_gpu = device.type == "cuda" and can_build()
    return config.train.fast and on_gpu and choose_precision(config, device) == "bf16"


def compiled_code() -> str:
    """Hash of the source of all that may be part of a compiled step."""
    found = hashlib.sha256()
    for folder in ("diagnostics", "kernels", "model"):
        for path in sorted(Path(normfree.__file__).parent.joinpath(folder).glob("*.py")):
            found.update(path.read_bytes())
    for sha256 in plugins.loaded.values():
        found.update(sha256.encode())
    return found.hexdigest()


def compiled(model: nn.Module, enabled: bool) -> Callable[..., Any]:
    """The model as one graph; a graph break is an error. The raw module stays beside it and shares its weights."""
    if not enabled:
        return model
    # What one process compiles the next one finds, graphs with autograd functions of ours too. The cache's key does not
    # see into custom operators, whose gradients are part of what is kept: so it is given the code as well.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch.compiler.config.cache_key_tag = USERS_TAG + compiled_code()
    # The processes that compile kernels have it from the environment: each notes which configuration of a kernel is the
    # fastest, and under another key no later start would find that.
    os.environ[KEY_TAG] = torch.compiler.config.cache_key_tag
    return torch.compile(model, fullgraph=True, dynamic=False)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


@contextmanager
def process_flags(deterministic: bool) -> Iterator[None]:
    """Process-wide switches of one run, put back afterwards: several runs of a sweep share a process."""
    before = torch.are_deterministic_algorithms_enabled()
    tag = os.environ.get(KEY_TAG)
    memory: Any = torch.utils.deterministic  # a module whose switch is a property: its types do not show it
    fill = memory.fill_uninitialized_memory
    torch.compiler.reset()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for, read at its first call
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # costs time, and nothing reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill
        if tag is None:
            os.environ.pop(KEY_TAG, None)
        else:
            os.environ[KEY_TAG] = tag

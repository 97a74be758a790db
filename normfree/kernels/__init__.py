"""The fast paths of training, as operators; each has the same contract in PyTorch beside it."""

import os
import shutil
from functools import cache

import torch
import torch.utils._triton
from torch import Tensor


@cache
def can_build() -> bool:
    """Whether Triton can build kernels for this machine's GPU: it takes a C compiler, and compute capability 8."""
    compilers = (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")
    if not any(map(shutil.which, compilers)) or not torch.cuda.is_available() or not torch.utils._triton.has_triton():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The half precision that autocast multiplies x in; None outside autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

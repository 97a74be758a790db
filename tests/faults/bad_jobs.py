"""A plug-in: activations of jobs that end badly, each in a training step of its own choice."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from normfree import register_activation
from normfree.model.activations import Activation

CALLS = 12  # forward passes of its layer before it happens: in the sixth step or so, after a checkpoint


class Late(Activation):
    """SiLU, and after `CALLS` forward passes of the process something else as well."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == CALLS:
            x = self.happens(x)
        return torch.nn.functional.silu(x)

    def happens(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@register_activation("diverging")
class Diverging(Late):
    def happens(self, x: Tensor) -> Tensor:
        return x * float("inf")


@register_activation("raising")
class Raising(Late):
    def happens(self, x: Tensor) -> Tensor:
        raise RuntimeError("a fault of the code")


@register_activation("exiting")
class Exiting(Late):
    def happens(self, x: Tensor) -> Tensor:
        sys.exit(3)


class Once(Late):
    """It happens in one process only: a file of that name is left behind."""

    signum = signal.SIGTERM

    def happens(self, x: Tensor) -> Tensor:
        marker = Path(os.environ["BAD_JOBS"]) / type(self).__name__
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), self.signum)
        return x


@register_activation("stopped")
class Stopped(Once):
    pass


@register_activation("killed")
class Killed(Once):
    signum = signal.SIGKILL


@register_activation("hashing")
class Hashing(Activation):
    """Depends on PYTHONHASHSEED."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + hash("x") % 1000 / 1e6)

"""A fault planted on purpose (`debug.inject`), so that finding, naming and replaying faults can be tested.

One element of one tensor becomes NaN or Inf at one step. Which element follows from the step and the name alone, so a
replay plants the same one. What each phase plants in, by the path that `debug.inject.module` gives:

- phase=forward: a module's output (`blocks.1.mlp.fc`), or a weight (`blocks.1.mlp.fc.weight`);
- phase=backward: the gradient with respect to a module's output, or a weight's, after the last micro-batch;
- phase=optimizer: a moment (`blocks.1.mlp.fc.weight.exp_avg`, or `.exp_avg_sq`), just before the update.

Outputs and their gradients are those of the step's first micro-batch.
"""

import hashlib
import math
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from normfree.config import InjectConfig
from normfree.errors import UserError
from normfree.model import Transformer

VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
MOMENTS = ("exp_avg", "exp_avg_sq")
LIST = "list"  # as a module: name them all
NEAREST = 5


@torch.no_grad()
def running_modules(model: Transformer) -> list[str]:
    """Names of the modules that run in a forward pass, the root aside; an embedding used as a matrix is none."""
    seen: dict[str, None] = {}
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.setdefault(name))
        for name, module in model.named_modules()
        if name
    ]
    model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=model.wte.weight.device))
    for handle in handles:
        handle.remove()
    return list(seen)


def _no_such(kind: str, path: str, names: list[str]) -> UserError:
    """Of a name that the model has not: the few nearest. All of them, a page, for who asks with module=list."""
    if path == LIST:
        return UserError(f"debug.inject.module={LIST}: choose one {kind} of: {', '.join(names)}.")
    nearest = get_close_matches(path[:100], names, n=NEAREST, cutoff=0)
    meant = f"Did you mean {nearest[0]!r}? Near it: {', '.join(nearest[1:])}"
    every = f"debug.inject.module={LIST} names all {len(names)}"
    return UserError(f"debug.inject.module: unknown {kind} {path[:100]!r}. {meant} ({every}).")


def _planted(tensor: Tensor, draw: int, value: float) -> Tensor:
    """A copy of `tensor` with `value` in one element."""
    flat = tensor.flatten().clone()
    flat[draw % flat.numel()] = value
    return flat.view(tensor.shape)


class _PlantGradient(torch.autograd.Function):
    """The identity; its backward plants a value in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: int, value: float) -> Tensor:
        ctx.draw, ctx.value = draw, value
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _planted(grads[0], ctx.draw, ctx.value), None, None


class Injector:
    """Plants what `inject` says, in step `inject.step` only.

        injector = Injector(model, optimizer, config.debug.inject)      # before the model is compiled
        injector.before_forward(step, micro)                            # before each micro-batch
        injector.after_backward(step)                                   # after the last one's backward pass
        injector.before_optimizer(step)
        injector.undo()                                                 # after the update

    Without an injection (`inject.step` is null) there is no hook and every method returns at once. With one, the hook
    begins with one plain attribute, `armed`: a compiled step has one more variant, which only the armed step runs.

    Raises `UserError` where the model has no such module, parameter or moment.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, inject: InjectConfig) -> None:
        self.armed = False
        self.inject = inject
        self.active = inject.step is not None
        self._restore: tuple[Tensor, Tensor] | None = None
        if not self.active:
            return
        self.optimizer = optimizer
        self.value = VALUES[inject.value]
        path = inject.module or ""
        digest = hashlib.sha256(f"{inject.step}/{path}".encode()).digest()
        self.draw = int.from_bytes(digest[:8], "little") >> 1
        self.parameter: nn.Parameter | None = None
        self.moment = ""
        parameters = dict(model.named_parameters())
        if inject.phase == "optimizer":
            moments = {f"{name}.{moment}": (p, moment) for name, p in parameters.items() for moment in MOMENTS}
            if path not in moments:
                raise _no_such("optimizer moment", path, list(moments))
            if inject.step == 0:
                raise UserError("debug.inject.step=0: before the first update there are no optimizer moments.")
            self.parameter, self.moment = moments[path]
            return
        modules = running_modules(model)
        if path in parameters:
            self.parameter = parameters[path]
        elif path in modules:
            model.get_submodule(path).register_forward_hook(self._hook)
        else:
            raise _no_such("module or parameter", path, [*modules, *parameters])

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.armed:
            return None
        if self.inject.phase == "backward":
            return _PlantGradient.apply(output, self.draw, self.value)
        return _planted(output, self.draw, self.value)

    def _due(self, step: int, phase: str) -> bool:
        return self.active and step == self.inject.step and phase == self.inject.phase

    def before_forward(self, step: int, micro: int) -> None:
        """Arm the hook, or plant in the weight, for micro-batch `micro` of `step`."""
        if not self.active:
            return
        self.armed = self.parameter is None and step == self.inject.step and micro == 0
        if self._due(step, "forward") and self.parameter is not None and micro == 0:
            self._plant(self.parameter.detach())

    def after_backward(self, step: int) -> None:
        """Plant in the gradient of a parameter."""
        if self._due(step, "backward") and self.parameter is not None:
            assert self.parameter.grad is not None, "no backward pass has run"
            self._plant(self.parameter.grad)

    def before_optimizer(self, step: int) -> None:
        """Plant in a moment."""
        if self._due(step, "optimizer"):
            assert self.parameter is not None
            state = self.optimizer.state[self.parameter]
            if self.moment not in state:
                raise UserError(f"debug.inject: step {step} comes before the first update, which makes the moments.")
            self._plant(state[self.moment])

    def undo(self) -> None:
        """Disarm, and put back what was planted in a weight, a gradient or a moment."""
        self.armed = False
        if self._restore is not None:
            element, before = self._restore
            element.copy_(before)
            self._restore = None

    def _plant(self, tensor: Tensor) -> None:
        assert self._restore is None, "what was planted before was not undone"
        element = tensor.detach().view(-1)[self.draw % tensor.numel()]  # a view: written in place
        self._restore = element, element.clone()
        element.fill_(self.value)

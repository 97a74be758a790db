"""Where a step first met a value that is not finite: which module, in the order of execution, and in which phase.

The step runs once more, eagerly, with every tensor on its way looked at: the weights of a module when it first runs,
what goes into it and what comes out; then the gradient that arrives at its output and the one it hands on, and the
gradients of weights; then the optimizer's moments. Each look leaves five numbers on the device, and all of them come to
the host in one transfer. The first bad one in order of execution names the fault:

- an output that is bad although the inputs were not: that module, and of several inside each other the innermost;
- an input that is bad although every output before it was finite: the code between two modules, so their parent;
- a gradient handed on that is bad although the one that arrived was finite: that module, by its backward pass.

A weight that no module of its own uses (a position embedding or a head, used as a matrix) is blamed where the fault is
in the code that uses it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree.diagnostics.finding import Finding, value_name
from normfree.diagnostics.inject import Injector
from normfree.model import Transformer

ROOT = "model"  # what the code between the outermost modules is called
LOSS = "loss"  # the head's logits and the loss: they are no module


class _Look(NamedTuple):
    """One look at one tensor."""

    micro: int
    phase: str
    kind: str  # parameter, unused, input, output, loss, arrived, inside, handed_on, moment
    module: str
    tensor: str
    shape: torch.Size
    parent: str


@dataclass
class Trace:
    """What a traced step came to. `largest`: largest finite magnitude of each module's output."""

    finding: Finding | None
    loss: float
    grad_norm: float
    largest: dict[str, float]


def _numbers(tensor: Tensor) -> Tensor:
    """Count of NaN, count of Inf, flat index and value of the first of them, largest finite magnitude: (5,) float64."""
    flat = tensor.detach().flatten()
    bad = ~flat.isfinite()
    first = bad.to(torch.uint8).argmax()
    largest = torch.where(bad, 0, flat.abs()).amax()
    return torch.stack([x.double() for x in (flat.isnan().sum(), flat.isinf().sum(), first, flat.take(first), largest)])


class _Watch:
    """Hooks on every module and parameter of a model, and what they saw."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.micro = 0
        self.looks: list[_Look] = []
        self.numbers: list[Tensor] = []
        self.stack: list[str] = []
        self.seen: set[str] = set()  # modules whose own parameters were looked at
        self.handles: list[Any] = []

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(self, phase: str, kind: str, module: str, tensor: str, value: Tensor) -> None:
        if value.numel() == 0:
            return
        parent = self.stack[-1] if self.stack else ROOT
        self.looks.append(_Look(self.micro, phase, kind, module, tensor, value.shape, parent))
        self.numbers.append(_numbers(value))

    def _passing(self, value: Any, kind: str, module: str) -> Any:
        """`value` itself, through an identity of its own whose gradient is looked at when it comes back."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        parent = self.stack[-1] if self.stack else ROOT
        passing = value.view_as(value)

        def on_gradient(grad: Tensor) -> None:
            self.looks.append(_Look(self.micro, "backward", kind, module, "gradient", grad.shape, parent))
            self.numbers.append(_numbers(grad))

        passing.register_hook(on_gradient)
        return passing

    def parameters(self, module: str, owner: nn.Module, kind: str) -> None:
        if module not in self.seen:
            self.seen.add(module)
            for name, parameter in owner.named_parameters(recurse=False):
                self.look("forward", kind, module, name, parameter)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        for name, module in self.model.named_modules():
            if name:
                self._attach(name, module)
        for name, parameter in self.model.named_parameters():
            module, _, leaf = name.rpartition(".")

            def on_accumulated(p: Tensor, module: str = module, leaf: str = leaf) -> None:
                self.look("backward", "parameter", module, f"{leaf}.grad", p.grad)  # type: ignore[arg-type]

            self.handles.append(parameter.register_post_accumulate_grad_hook(on_accumulated))

    def _attach(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self.parameters(name, module, "parameter")
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.look("forward", "input", name, "input", value)
            args = tuple(self._passing(value, "handed_on", name) for value in args)
            kwargs = {key: self._passing(value, "handed_on", name) for key, value in kwargs.items()}
            self.stack.append(name)
            return args, kwargs

        # Two hooks behind the module: between them runs the one of a planted fault, if there is any.
        def inside(module: nn.Module, args: Any, output: Any) -> Any:
            assert self.stack.pop() == name
            return self._passing(output, "inside", name)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor) and output.is_floating_point():
                self.look("forward", "output", name, "output", output)
            return self._passing(output, "arrived", name)

        self.handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(inside, prepend=True),
            module.register_forward_hook(leave),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    # -- judging ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring all numbers to the host."""
        self.table = torch.stack(self.numbers).cpu().tolist() if self.numbers else []

    def first_bad(self) -> tuple[int, str, str] | None:
        """(position in `looks`, module blamed, tensor), or None where everything was finite."""
        bad = [i for i, row in enumerate(self.table) if row[0] + row[1] > 0]
        unused = [i for i in bad if self.looks[i].kind == "unused"]
        used = [i for i in bad if self.looks[i].kind != "unused"]
        if not used:
            return next(((i, self.looks[i].module, self.looks[i].tensor) for i in unused), None)
        position = used[0]
        module, tensor = self._blame(position)
        for i in unused:
            owner = self.looks[i].module
            if module in (ROOT, LOSS) or owner.startswith(f"{module}."):
                return i, owner, self.looks[i].tensor
        return position, module, tensor

    def _blame(self, position: int) -> tuple[str, str]:
        look = self.looks[position]
        if look.kind == "input":
            return look.parent, "intermediate"
        if look.kind == "arrived":  # the gradient broke on its way from the modules that use this output
            last = [other.module for other in self.looks if other.kind == "output" and other.parent == ROOT][-1]
            return (LOSS if look.module == last else look.parent), "gradient"
        return look.module, look.tensor

    def largest(self, position: int, kinds: tuple[str, ...]) -> float | None:
        """Largest finite magnitude among the looks of `kinds` at the module and micro-batch of `position`."""
        at = self.looks[position]
        found = [
            self.table[i][4]
            for i, look in enumerate(self.looks[: position + 1])
            if (look.module, look.micro) == (at.module, at.micro) and look.kind in kinds
        ]
        return max(found, default=None)

    def finding(self, step: int) -> Finding | None:
        first = self.first_bad()
        if first is None:
            return None
        position, module, tensor = first
        look, (nans, infs, index, value, largest) = self.looks[position], self.table[position]
        arrived = ("arrived",) if look.phase == "backward" else ("input",)
        return Finding(
            step=step,
            micro_batch=look.micro,
            phase=look.phase,
            module=module,
            tensor=tensor,
            value=value_name(value),
            nan_count=int(nans),
            inf_count=int(infs),
            elements=look.shape.numel(),
            index=tuple(int(i) for i in torch.unravel_index(torch.tensor(int(index)), look.shape)),
            input_max=None if look.kind in ("moment", "parameter", "unused") else self.largest(position, arrived),
            output_max=largest,
        )


@contextmanager
def _watching(model: Transformer) -> Iterator[_Watch]:
    """A watch on `model`, whose gradients are put back afterwards."""
    watch = _Watch(model)
    grads = {p: p.grad for p in model.parameters()}
    for p in grads:
        p.grad = None
    watch.attach()
    try:
        yield watch
    finally:
        watch.detach()
        for p, grad in grads.items():
            p.grad = grad


def _look_at_the_unused(watch: _Watch) -> None:
    for name, module in watch.model.named_modules():
        watch.parameters(name or ROOT, module, "unused")


def _look_at_moments(watch: _Watch, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in watch.model.named_parameters():
        module, _, leaf = name.rpartition(".")
        for key, moment in optimizer.state.get(parameter, {}).items():
            if isinstance(moment, Tensor) and key != "step":
                watch.look("optimizer", "moment", module, f"{leaf}.{key}", moment)


def trace_step(
    model: Transformer,
    losses: Sequence[Callable[[], Tensor]],
    *,
    step: int,
    scale: Tensor | float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    injector: Injector | None = None,
) -> Trace:
    """Run one optimizer step's forward and backward passes on the raw module, and look at everything.

    `losses`: one function a micro-batch, which runs its forward pass through `model` (dropout seeded, autocast on, as
    in training) and returns the loss, normalised but not scaled; `scale` is fp16's loss scale. `injector` plants its
    fault again. No weight, moment or gradient is changed, and no hook stays.
    """
    total = torch.zeros((), dtype=torch.float64)
    with _watching(model) as watch:
        try:
            for micro, loss_of in enumerate(losses):
                watch.micro = micro
                if injector is not None:
                    injector.before_forward(step, micro)
                loss = loss_of()
                if micro == 0:
                    _look_at_the_unused(watch)
                watch.look("forward", "loss", LOSS, "loss", loss)
                total += loss.detach().double().cpu()
                (loss * scale).backward()
            if injector is not None:
                injector.after_backward(step)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    module, _, leaf = name.rpartition(".")
                    watch.look("backward", "parameter", module, f"{leaf}.grad", p.grad)
            norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
            if optimizer is not None:
                if injector is not None:
                    injector.before_optimizer(step)
                _look_at_moments(watch, optimizer)
        finally:
            if injector is not None:
                injector.undo()
    watch.settle()
    return Trace(
        finding=watch.finding(step),
        loss=total.item(),
        grad_norm=(torch.stack(norms).norm() / scale).item(),
        largest=_largest_outputs(watch),
    )


def _largest_outputs(watch: _Watch) -> dict[str, float]:
    largest: dict[str, float] = {}
    for look, row in zip(watch.looks, watch.table, strict=True):
        if look.kind == "output":
            largest[look.module] = max(largest.get(look.module, 0.0), row[4])
    return largest


def first_non_finite(
    model: Transformer, losses: Sequence[Callable[[], Tensor]], *, step: int, **options: Any
) -> Finding | None:
    """The first non-finite value of a step, or None; the arguments are those of `trace_step`."""
    return trace_step(model, losses, step=step, **options).finding

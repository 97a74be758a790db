"""A postmortem's step, run again: as it was trained, then eagerly and traced, then traced in float64.

The second pass names the place, the third says what kind of fault it was. What is finite in float64 was lost to the
range or the rounding of the run's precision: an overflow. What is not finite in float64 either is a divergence of the
numbers themselves. A replay may also meet nothing (other hardware, other kernels), and says so.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from normfree.diagnostics.finding import Finding
from normfree.diagnostics.inject import Injector
from normfree.diagnostics.trace import Trace, trace_step
from normfree.errors import UserError
from normfree.model import Transformer
from normfree.records import strict
from normfree.training import checkpoint as ckpt
from normfree.training import machine
from normfree.training.autopsy import is_spike
from normfree.training.faults import LossScaler
from normfree.training.optimizer import build_optimizer, gradient_norms, moments, peaks, trained
from normfree.training.postmortem import Postmortem
from normfree.training.step import StepInputs

PLANTED, OVERFLOW, DIVERGENCE, NOT_REPRODUCED = "planted", "overflow", "divergence", "not reproduced"
SPIKE = "spike"
LOSS_AGREES = 1e-2  # relative: a step on another device, or not compiled, is the same step


@dataclass(frozen=True)
class Pass:
    """One way of running the step. `finding` is of a traced pass; `bad`: something was not finite."""

    name: str
    loss: float
    grad_norm: float
    bad: bool
    finding: Finding | None = None
    largest: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "loss": strict(self.loss),
            "grad_norm": strict(self.grad_norm),
            "bad": self.bad,
            "finding": None if self.finding is None else self.finding.to_dict(),
        }


@dataclass(frozen=True)
class Replay:
    """What a replay came to: the verdict, its reason in words, and the passes it rests on."""

    step: int
    verdict: str
    words: str
    recorded: Finding | None
    passes: list[Pass]
    notes: list[str]

    @property
    def finding(self) -> Finding | None:
        """Of the eager pass in the run's own precision."""
        return self.passes[1].finding

    @property
    def same_place(self) -> bool:
        """Whether that pass stopped where the run did: phase, module and tensor."""
        if self.recorded is None or self.finding is None:
            return self.recorded is self.finding
        return self.recorded.place == self.finding.place

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "verdict": self.verdict,
            "words": self.words,
            "same_place": self.same_place,
            "recorded": None if self.recorded is None else self.recorded.to_dict(),
            "passes": [p.to_dict() for p in self.passes],
            "notes": self.notes,
        }


class _KeepFloat64(TorchFunctionMode):
    """Norms and losses compute in `x.float()`, which would narrow float64: in this mode it stays what it is."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        to_float32 = func == torch.Tensor.to and any(x is torch.float32 for x in (*args[1:], *kwargs.values()))
        if (to_float32 or func == torch.Tensor.float) and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


class _State:
    """The model, optimizer, loss scale and planted fault as they were before the step."""

    def __init__(self, pm: Postmortem, device: torch.device, double: bool) -> None:
        config = pm.config
        self.model = Transformer(config.model).to(device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = LossScaler(config.train.precision == "fp16" and not double, device)
        saved = self.scaler.state() if config.train.precision == "fp16" and not double else {}
        ckpt.load_training_state(self.model, self.optimizer, saved, pm.checkpoint)
        if double:
            self.model.double()
        self.injector = Injector(self.model, self.optimizer, config.debug.inject)
        self.inputs = StepInputs(config, pm.step, pm.rows, device, "fp32" if double else config.train.precision)

    def trace(self, step: int) -> Trace:
        losses = self.inputs.losses(self.model)
        return trace_step(
            self.model,
            losses,
            step=step,
            scale=self.scaler.scale,
            optimizer=self.optimizer,
            injector=self.injector,
        )


def _as_trained(pm: Postmortem, device: torch.device, compiled: bool) -> Pass:
    """The whole step up to the update, as the trainer runs it."""
    state = _State(pm, device, double=False)
    model, optimizer, injector = state.model, state.optimizer, state.injector
    forward = machine.compiled(model, compiled)
    fast = machine.choose_fast(pm.config, device) and not injector.active
    total = torch.zeros((), device=device)
    for micro, loss_of in enumerate(state.inputs.losses(forward)):
        injector.before_forward(pm.step, micro)
        with model.fast_paths(fast):
            loss = loss_of()
        (loss * state.scaler.scale).backward()
        total += loss.detach()
    injector.after_backward(pm.step)
    injector.before_optimizer(pm.step)
    parameters = trained(model)
    state.scaler.unscale_([p.grad for p in parameters if p.grad is not None])
    norm = gradient_norms(parameters).norm()
    bad = not bool(
        total.isfinite()
        & norm.isfinite()
        & peaks([p.detach() for p in parameters] + moments(optimizer)).isfinite().all()
    )
    injector.undo()
    return Pass(f"as trained{', compiled' if compiled else ''}", total.item(), norm.item(), bad)


def _traced(pm: Postmortem, device: torch.device, double: bool) -> Pass:
    with ExitStack() as stack:
        if double:
            stack.enter_context(_KeepFloat64())
            # Fused attention recomputes e^(score - lse) in its backward pass, which overflows at scores that are large
            # and finite; the plain kernel does not.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        trace = _State(pm, device, double).trace(pm.step)
    name = "eager, float64" if double else f"eager, {pm.config.train.precision}"
    bad = trace.finding is not None
    return Pass(name, trace.loss, trace.grad_norm, bad, trace.finding, trace.largest)


def replay(pm: Postmortem, device: torch.device) -> Replay:
    """Run the step of `pm` three times on `device`, and judge. Nothing on disk is changed."""
    notes = []
    seen = pm.circumstances
    if seen.device != device.type:
        notes.append(
            f"The run was on {seen.device}, this replay is on {device.type}: other kernels, in the same precision."
        )
    compiled = seen.compiled and seen.device == device.type
    with machine.process_flags(machine.choose_deterministic(pm.config, device)):
        passes = [
            _as_trained(pm, device, compiled),
            _traced(pm, device, double=False),
            _traced(pm, device, double=True),
        ]
    verdict, words = judge(pm, *passes)
    return Replay(pm.step, verdict, words, pm.finding, passes, notes)


def judge(pm: Postmortem, trained: Pass, eager: Pass, double: Pass) -> tuple[str, str]:
    """(verdict, its reason in one or two sentences)"""
    seen = pm.circumstances
    if is_spike(pm.config, seen.loss, seen.grad_norm) and math.isclose(trained.loss, seen.loss, rel_tol=LOSS_AGREES):
        return SPIKE, (
            f"Every number is finite, now as then, and the loss is {trained.loss:.6g}, as it was. What stopped the run "
            "is how far that lay above the losses before it (spike_sigma)."
        )
    if not trained.bad and not eager.bad:
        return NOT_REPRODUCED, "The step is finite when it is run again: what the run met did not happen here."
    found = eager.finding
    inject = pm.config.debug.inject
    if inject.step == pm.step:
        text = f"debug.inject planted {inject.value} in {inject.module} ({inject.phase})"
        if found is not None and (found.phase, found.site) == (inject.phase, inject.module):
            return PLANTED, text + ", and that is where the trace stopped."
        return PLANTED, text + ", but the trace stopped elsewhere."
    if double.finding is not None:
        return DIVERGENCE, f"It is not finite in float64 either: {double.finding.words()}"
    if found is None and math.isfinite(trained.loss) and math.isinf(trained.grad_norm):
        return OVERFLOW, "Every gradient is finite; the norm of all together overflows float32."
    if found is None:
        return OVERFLOW, (
            "Only the step as it was trained meets it; run eagerly in the same precision it is finite, and in float64 "
            "too: a question of range or rounding in its kernels."
        )
    return OVERFLOW, f"In float64 the step is finite (loss {double.loss:.6g}). {_range(pm, found, double)}"


def _range(pm: Postmortem, found: Finding, double: Pass) -> str:
    """How far beyond the range of the run's precision the module's output goes."""
    precision = pm.config.train.precision
    limit = torch.finfo(machine.DTYPES[precision]).max
    reached = double.largest.get(found.module)
    if reached is None or found.tensor != "output":
        return f"In {precision}, {found.words()}"
    if reached > limit:
        return f"There the output of {found.module} reaches {reached:.3g}; {precision} ends at {limit:.3g}."
    return (
        f"There the output of {found.module} reaches {reached:.3g}, which {precision} can hold: an intermediate result "
        "overflowed, or rounding did it."
    )


def show(result: Replay, console: Console) -> None:
    """The passes as a table, then the verdict."""
    table = Table(
        "pass", "loss", "gradient norm", "first non-finite", title=f"step {result.step}", title_justify="left"
    )
    for p in result.passes:
        place = "-" if p.finding is None else f"{p.finding.module} ({p.finding.phase}, {p.finding.tensor})"
        if p.bad and p.finding is None:
            place = "yes (not traced)"
        table.add_row(p.name, f"{p.loss:.6g}", f"{p.grad_norm:.6g}", place)
    console.print(table)
    for note in result.notes:
        console.print(note)
    if result.finding is not None:
        console.print(result.finding.words())
    if result.same_place:
        console.print("Recorded by the run: the same place." if result.recorded else "The run's trace found nothing.")
    else:
        recorded = "nothing" if result.recorded is None else result.recorded.words()
        console.print(f"Recorded by the run: {recorded}")
    console.print(f"verdict: {result.verdict}. {result.words}")


def choose_device(pm: Postmortem, wanted: str | None) -> torch.device:
    """`wanted`, else the run's device where there is one, else the CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave the option out to compute on the CPU.")
    if wanted is None:
        wanted = "cuda" if pm.circumstances.device == "cuda" and torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def check_plugins(pm: Postmortem, given: list[dict[str, str]]) -> None:
    """Refuse a replay without the plug-ins of the run, or with others."""
    needed = {plugin["sha256"]: plugin["path"] for plugin in pm.circumstances.plugins}
    missing = [path for digest, path in needed.items() if digest not in {plugin["sha256"] for plugin in given}]
    if missing:
        raise UserError(f"the run used plug-ins; give the same files: --plugin {' --plugin '.join(missing)}")

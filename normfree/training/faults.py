"""What happens when numbers go bad: the finite flag that guards every update, and fp16's loss scale.

The flag lives on the device and masks the optimizer there, so the host need not wait for it. Under `raise` it is
sticky: from the first bad step on, no update changes weights, moments or step count, until the host, which learns of it
at most `LAG` steps later, stops the run. The weights are then exactly those before the bad step.
"""

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfree.diagnostics.finding import Finding
from normfree.errors import EXIT_DIVERGED, UserError

LAG = 2  # steps the host may be ahead of what it knows of the device


class Diverged(UserError):
    """Training met a value that is not finite, and the policy is to stop. `fault`: None where no step was traced."""

    def __init__(self, step: int, message: str, fault: "Fault | None" = None) -> None:
        super().__init__(message, EXIT_DIVERGED)
        self.step = step
        self.fault = fault


class Fault(NamedTuple):
    """The numbers of a bad step, and its first non-finite value; None where the traced step did not meet it again."""

    finding: Finding | None
    loss: float
    grad_norm: float


class FiniteFlag:
    """Device-side verdict on each step, and the mask that the optimizer obeys."""

    def __init__(self, policy: str, device: torch.device) -> None:
        self.policy = policy
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.mask = torch.zeros((), device=device)  # 1.0: the optimizer leaves everything as it is

    def judge(self, finite: Tensor, step: int, overflow: Tensor) -> None:
        """Take in whether step `step` is finite; `overflow` (0-d bool) masks this step without being bad: fp16's."""
        bad = ~finite
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), step, self.first_bad))
        self.bad_steps.add_(bad)
        if self.policy == "raise":
            masked = (self.first_bad >= 0) | overflow
        elif self.policy == "skip":
            masked = bad | overflow
        else:
            masked = overflow
        self.mask.copy_(masked)


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al., arXiv:1710.03740), on the device.

    The scale halves when gradients overflow and doubles after `interval` steps without. Scale 1 and inert if disabled.
    `lowest`: a scale at which there is nothing left to blame, so that non-finite gradients are a bad step like any
    other. None skips for ever, as PyTorch's GradScaler does and the original's runs did.
    """

    def __init__(
        self,
        enabled: bool,
        device: torch.device,
        start: float = 2.0**16,
        interval: int = 2000,
        lowest: float | None = 1.0,
    ) -> None:
        self.enabled = enabled
        self.lowest = -math.inf if lowest is None else lowest
        self.interval = interval
        self.scale = torch.tensor(start if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def unscale_(self, grads: list[Tensor]) -> None:
        if self.enabled:
            torch._foreach_mul_(grads, 1.0 / self.scale)

    def overflowed(self, grads_finite: Tensor) -> Tensor:
        """Whether this step's gradients overflowed because of the scale; moves the scale."""
        if not self.enabled:
            return torch.zeros_like(grads_finite)
        overflow = ~grads_finite & (self.scale > self.lowest)
        self.good_steps.copy_(torch.where(grads_finite, self.good_steps + 1, 0))
        self.skipped.add_(overflow)
        grow = self.good_steps == self.interval
        factor = torch.where(grads_finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(min=self.lowest)
        self.good_steps.masked_fill_(grow, 0)
        return overflow

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}


class Settled(NamedTuple):
    """What the host knows of a step once its numbers have arrived."""

    step: int
    values: Tensor  # float64, the flat vector given to `Mailbox.post`
    extra: Any


class Mailbox:
    """Numbers on their way from the device: posted without waiting, taken out `LAG` steps later, in order."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.lag = LAG if self.cuda else 0
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None, Any]] = deque()

    def post(self, step: int, values: Tensor, extra: Any = None) -> None:
        event = None
        if self.cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = host
        self._waiting.append((step, values, event, extra))

    def settled(self, everything: bool = False) -> list[Settled]:
        """Posts older than the lag, or all of them (then the host waits)."""
        out = []
        while len(self._waiting) > (0 if everything else self.lag):
            step, values, event, extra = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            out.append(Settled(step, values, extra))
        return out

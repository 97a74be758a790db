"""What happens when numbers go bad: the finite flag that guards every update, and fp16's loss scale.

The flag lives on the device and masks the optimizer there, so the host need not wait for it. Under `raise` and
`rollback` it is sticky: from the first bad step on, no update changes weights, moments or step count, until the host,
which learns of it at most `LAG` steps later, stops the run or takes it back. The weights are then exactly those before
the bad step. Under `skip` it gets so at the last of `MAX_SKIPS` bad steps in a row: such a run never comes back.
"""

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfree.config import RollbackConfig
from normfree.diagnostics.finding import Finding
from normfree.errors import EXIT_DIVERGED, UserError

MAX_ROLLBACKS = 16
MAX_SKIPS = 100  # bad steps in a row under nan_policy=skip
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
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)  # bad steps up to now
        self.sticky = policy in ("raise", "rollback")
        self.mask = torch.zeros((), device=device)  # 1.0: the optimizer leaves everything as it is

    def judge(self, finite: Tensor, step: int, overflow: Tensor) -> None:
        """Take in whether step `step` is finite; `overflow` (0-d bool) masks this step without being bad: fp16's."""
        bad = ~finite
        given_up = self.in_a_row >= MAX_SKIPS  # by the step before; stays so until the host has heard of it
        self.in_a_row.copy_(torch.where(given_up, self.in_a_row, torch.where(bad, self.in_a_row + 1, 0)))
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), step, self.first_bad))
        self.bad_steps.add_(bad)
        if self.sticky:
            masked = (self.first_bad >= 0) | overflow
        elif self.policy == "skip":
            masked = bad | overflow | given_up
        else:
            masked = overflow
        self.mask.copy_(masked)

    @property
    def frozen(self) -> Tensor:
        """0-d bool: a bad step was met, and the state is to stay as it was before it."""
        if self.sticky:
            return self.first_bad >= 0
        return (self.in_a_row >= MAX_SKIPS) & (self.policy == "skip")

    def stops(self, first_bad: float, in_a_row: float) -> bool:
        """Whether the host, given the flag's numbers of a step, is to end the run there or take it back."""
        return first_bad >= 0 if self.sticky else self.policy == "skip" and in_a_row >= MAX_SKIPS

    def clear(self) -> None:
        """The host has dealt with the bad step: as it was before it."""
        self.first_bad.fill_(-1)
        self.bad_steps.zero_()
        self.in_a_row.zero_()
        self.mask.zero_()


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
        """Whether this step's gradients overflowed because of the scale, 0-d bool."""
        if not self.enabled:
            return torch.zeros_like(grads_finite)
        return ~grads_finite & (self.scale > self.lowest)

    def move(self, grads_finite: Tensor, overflow: Tensor, frozen: Tensor) -> None:
        """Move the scale after a step; not where the run is `frozen`, 0-d bool: the state before a bad step stays."""
        if not self.enabled:
            return
        good = torch.where(grads_finite, self.good_steps + 1, 0)
        grow = good == self.interval
        factor = torch.where(grads_finite, torch.where(grow, 2.0, 1.0), 0.5)
        scale = (self.scale * factor).clamp(min=self.lowest)
        self.scale.copy_(torch.where(frozen, self.scale, scale))
        self.good_steps.copy_(torch.where(frozen, self.good_steps, good.masked_fill(grow, 0)))
        self.skipped.add_(overflow & ~frozen)

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}


class SpikeWatch:
    """Whether a loss lies `sigma` standard deviations above the last `window` ones, on the device.

    Losses of bad steps, spikes among them, never enter the window. Nothing is a spike until it is full.
    """

    def __init__(self, sigma: float | None, device: torch.device, window: int = 64) -> None:
        self.sigma = sigma
        self.losses = torch.zeros(window if sigma is not None else 0, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)

    def is_spike(self, loss: Tensor) -> Tensor:
        """0-d bool."""
        if self.sigma is None:
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        std, mean = torch.std_mean(self.losses)
        return (self.seen >= self.losses.numel()) & (loss > mean + self.sigma * std)

    def take(self, loss: Tensor, good: Tensor) -> None:
        """Take in the loss of a step where it was `good`, 0-d bool."""
        if self.sigma is None:
            return
        window = self.losses.numel()
        here = torch.arange(window, device=loss.device) == self.seen % window
        self.losses.copy_(torch.where(here & good, loss, self.losses))
        self.seen.add_(good)

    def state(self) -> dict[str, Tensor]:
        return {} if self.sigma is None else {"losses": self.losses, "losses_seen": self.seen}


class RolledBack(Exception):
    """Raised inside the loop: the run goes on from a checkpoint before the bad step."""

    def __init__(self, fault: Diverged) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Rollbacks:
    """What rolling back has changed so far: batches left out, and a lower learning rate after each bad step.

    `bad_steps` (`MAX_ROLLBACKS`,) int64, -1 where there is none yet: the state that a checkpoint keeps. All else
    follows from it: a run resumed from an older checkpoint meets the same faults and takes the same way.
    """

    def __init__(self, config: RollbackConfig) -> None:
        self.config = config
        self.bad_steps = torch.full((MAX_ROLLBACKS,), -1, dtype=torch.int64)

    def _steps(self) -> list[int]:
        return [step for step in self.bad_steps.tolist() if step >= 0]

    @property
    def exhausted(self) -> bool:
        return len(self._steps()) >= self.config.retries

    def note(self, step: int) -> None:
        self.bad_steps[len(self._steps())] = step

    def leaves_out(self, step: int) -> bool:
        return step in self._steps()

    def lr_factor(self, step: int) -> float:
        """From the checkpoint on until `steps` after each bad step."""
        return self.config.lr_factor ** sum(step <= bad + self.config.steps for bad in self._steps())

    def state(self) -> dict[str, Tensor]:
        return {"rolled_back_at": self.bad_steps}


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

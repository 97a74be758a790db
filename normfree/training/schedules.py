"""Learning-rate schedules: factors on the peak rate, pure functions of the step."""

import math

from normfree.config import OptimConfig
from normfree.tables import SCHEDULES


def linear(progress: float, config: OptimConfig) -> float:
    """From 1 to lr_final in a straight line."""
    return 1 + (config.lr_final - 1) * progress


def cosine(progress: float, config: OptimConfig) -> float:
    """From 1 to lr_final along half a cosine (Loshchilov and Hutter, arXiv:1608.03983)."""
    return config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float, config: OptimConfig) -> float:
    """1 throughout."""
    return 1.0


def warmup_stable_decay(progress: float, config: OptimConfig) -> float:
    """1, then a straight line to lr_final over the last `decay_fraction` of what follows the warm-up.

    Hu et al., arXiv:2404.06395.
    """
    start = 1 - config.decay_fraction
    return 1.0 if progress <= start else linear((progress - start) / config.decay_fraction, config)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Rate of the update that leads from `step` to `step + 1` updates.

    Linear warm-up, whose first update already has lr / warmup_steps, to the peak; then the schedule over what is left.
    """
    warmup = config.warmup_steps
    assert warmup is not None, "the configuration is not resolved"
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return config.lr * SCHEDULES[config.schedule](progress, config)

"""One optimizer step's inputs, as the trainer and a replay both feed them: micro-batches, dropout seeds, losses."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.config import IGNORED, Config
from normfree.training import machine


def micro_batches(rows: np.ndarray, number: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Rows (B, T + 1) as `number` contiguous micro-batches of (idx, targets) on the device."""
    tokens = torch.from_numpy(rows)
    if device.type == "cuda":
        pinned = torch.empty(rows.shape, dtype=tokens.dtype, pin_memory=True)
        np.copyto(pinned.numpy(), rows)  # on this thread: PyTorch's copy would wake every core for half a megabyte
        tokens = pinned.to(device, non_blocking=True)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.chunk(number)]


def seed_dropout(config: Config, step: int, micro: int) -> None:
    """Dropout of a micro-batch depends on (seed, step, micro-batch) alone: there is no state to save."""
    dropout = config.model.dropout
    if any((dropout.embed, dropout.attn, dropout.resid)):
        digest = hashlib.sha256(f"dropout/{config.seed}/{step}/{micro}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class StepInputs:
    """Step `step` of a run, fed with `rows` int64 (B, T + 1)."""

    config: Config
    step: int
    rows: np.ndarray
    device: torch.device
    precision: str

    def losses(self, forward: Callable[..., Any]) -> list[Callable[[], Tensor]]:
        """One function a micro-batch: seed, forward pass, loss a token of the whole step (0-d, with a graph)."""
        micro = self.config.train.micro_batch_size
        assert micro is not None, "the configuration is not resolved"
        parts = micro_batches(self.rows, len(self.rows) // micro, self.device)
        return [partial(self._loss, forward, i, *part) for i, part in enumerate(parts)]

    def _loss(self, forward: Callable[..., Any], micro: int, idx: Tensor, targets: Tensor) -> Tensor:
        seed_dropout(self.config, self.step, micro)
        count = int((self.rows[:, 1:] != IGNORED).sum())
        with machine.autocast(self.device, self.precision):
            return forward(idx, targets).sum / count

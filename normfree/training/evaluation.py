"""Validation loss on a fixed set of tokens."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from normfree.config import IGNORED
from normfree.data.tokenizer import Tokenizer
from normfree.model import Transformer
from normfree.training.machine import autocast


def device_batches(rows: np.ndarray, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(idx, targets), each (b, T), of rows (N, T + 1)."""
    for start in range(0, len(rows), batch_size):
        part = torch.from_numpy(rows[start : start + batch_size]).to(device)
        yield part[:, :-1], part[:, 1:]


@torch.no_grad()
def evaluate_loss(model: Transformer, rows: np.ndarray, batch_size: int, precision: str) -> float:
    """Mean loss in nats a token over `rows` (N, T + 1), in eval mode; the mode is put back."""
    device = model.wte.weight.device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    for idx, targets in device_batches(rows, batch_size, device):
        with autocast(device, precision):
            out = model(idx, targets)
        total += out.sum
        count += out.count
    model.train(training)
    return float(total / count)


def bytes_per_token(rows: np.ndarray, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes of text a target of `rows` (N, T + 1) stands for on average; end-of-text stands for none."""
    targets = rows[:, 1:]
    targets = targets[targets != IGNORED]
    return tokenizer.n_bytes(targets[targets != tokenizer.end_of_text]) / len(targets)


def loss_metrics(loss: float, bytes_per_token: float) -> dict[str, float]:
    """val/loss (nats a token), val/perplexity and val/bits_per_byte (comparable across tokenizers)."""
    return {
        "val/loss": loss,
        "val/perplexity": math.inf if loss > 700 else math.exp(loss),  # above it: beyond the range of a float
        "val/bits_per_byte": loss / math.log(2) / bytes_per_token,
    }

"""Loss and attention of a model over many sequences: means by position, layer and head, nothing kept by sequence."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from normfree.config import IGNORED
from normfree.diagnostics import Observation, Recorder
from normfree.diagnostics.statistics import InfCount, NaNCount, PositionEntropy
from normfree.model import Transformer
from normfree.model.losses import head_logits
from normfree.training.evaluation import device_batches
from normfree.training.machine import autocast

LOGIT_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in fp32


class PositionEntropySum(PositionEntropy):
    """Entropy of each head's attention at each position, summed over sequences: batches differ in size."""

    over_micro_batches = "sum"
    dtype = torch.float64

    def measure(self, seen: Observation) -> Tensor:
        return seen.entropy.double().sum(dim=0)  # (H, T)


@dataclass(frozen=True)
class Measurement:
    """Means over all sequences of a split; a NaN anywhere is NaN in the means that it belongs to."""

    sequences: int
    tokens: int  # that have a next token to predict
    loss: float  # nats a token
    position_loss: np.ndarray  # float32 (T,), nats; NaN at a position that never has a target
    position_entropy: np.ndarray  # float32 (n_layer, n_head, T), nats
    counts: dict[str, np.ndarray]  # nan_count, inf_count: int64 (sites, n_layer), elements

    @property
    def entropy(self) -> np.ndarray:
        """float32 (n_layer, n_head), nats: the mean over positions."""
        return self.position_entropy.mean(axis=-1, dtype=np.float64).astype(np.float32)


def position_losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every target (B, T), given the final hidden states (B, T, C): float32 (B, T), nats, 0 where the
    target is ignored. Logits exist for a few rows at a time.
    """
    rows = max(1, LOGIT_ELEMENTS // (targets.size(1) * model.head_weight.size(0)))
    losses = []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head_logits(h, model.head_weight, model.vocab_used).float().flatten(0, 1)  # (b, T, V) -> (b * T, V)
        # Classes last: of logits (b, V, T) CUDA would have one thread go over all V, while most of the device is idle.
        each = F.cross_entropy(logits, t.flatten(), ignore_index=IGNORED, reduction="none")
        losses.append(each.view_as(t))
    return torch.cat(losses)


@torch.no_grad()
def measure_split(model: Transformer, rows: np.ndarray, batch_size: int = 8, precision: str = "fp32") -> Measurement:
    """Loss and attention of `model`, in eval mode, over rows (N, T + 1) of token ids; `IGNORED` is no target."""
    device, T = model.wte.weight.device, rows.shape[1] - 1
    total = torch.zeros(T, dtype=torch.float64, device=device)
    count = torch.zeros(T, dtype=torch.int64, device=device)
    statistics = {"position_entropy": PositionEntropySum, "nan_count": NaNCount, "inf_count": InfCount}
    recorder = Recorder(model, statistics, T)
    training = model.training
    model.eval()
    batches = -(-len(rows) // batch_size)
    recorder.start(micro_batches=batches)
    try:
        for idx, targets in tqdm(device_batches(rows, batch_size, device), total=batches, unit="batch", disable=None):
            with autocast(device, precision):
                losses = position_losses(model, model.hidden(idx), targets)
            total += losses.double().sum(dim=0)
            count += (targets != IGNORED).sum(dim=0)
        arrays = recorder.unpack(recorder.stop().cpu())
    finally:
        recorder.remove()
        model.train(training)
    entropy = arrays.pop("position_entropy") / np.float32(len(rows))
    position_loss = (total / count).float().cpu().numpy()
    return Measurement(len(rows), int(count.sum()), float(total.sum() / count.sum()), position_loss, entropy, arrays)

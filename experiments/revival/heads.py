"""Are overloaded heads wasted? Each head's attention replaced, and what it costs in loss.

A head's attention is replaced by uniform causal attention (row i: 1/(i+1) for each of its keys), and separately by its
own mean over other sequences, which keeps what depends on positions and loses what depends on the text. Values and all
other heads stay. A head whose replacement costs nothing does nothing with what it attends to.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.config import IGNORED
from normfree.heads import is_overloaded
from normfree.measure import position_losses
from normfree.model import Transformer
from normfree.training.evaluation import device_batches, evaluate_loss

BATCH = 64  # sequences a forward pass


def uniform_attention(T: int, device: torch.device) -> Tensor:
    """(T, T): row i has 1/(i+1) at its i + 1 keys."""
    ones = torch.ones(T, T, device=device).tril()
    return ones / ones.sum(dim=-1, keepdim=True)


@torch.no_grad()
def mean_attention(model: Transformer, rows: np.ndarray) -> Tensor:
    """Attention probabilities, mean over sequences: (n_layer, n_head, T, T), of rows (N, T + 1)."""
    sums: list[Any] = [0] * len(model.blocks)

    def add(layer: int, inputs: tuple[Tensor, ...], scale: float) -> None:
        q, k, _ = inputs
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale  # (B, H, T, T)
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        sums[layer] = sums[layer] + scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1).sum(dim=0)

    handles = []
    for layer, block in enumerate(model.blocks):
        inner: Any = block.attn.inner_attention  # type: ignore[union-attr]
        handles.append(inner.register_forward_hook(lambda m, inputs, _, layer=layer: add(layer, inputs, m.scale)))
    try:
        evaluate_loss(model, rows, BATCH, "fp32")
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(sums) / len(rows)


@contextmanager
def replaced(model: Transformer, heads: Iterable[tuple[int, int]], patterns: Tensor) -> Iterator[None]:
    """Within it, these (layer, head) attend as `patterns` (n_layer, n_head, T, T) say."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def hook(layer: int, chosen: list[int]) -> Any:
        def replace(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()  # (B, H, T, D)
            output[:, chosen] = patterns[layer, chosen].to(output.dtype) @ inputs[2][:, chosen]
            return output

        return replace

    handles = [
        model.blocks[layer].attn.inner_attention.register_forward_hook(hook(layer, chosen))  # type: ignore[union-attr]
        for layer, chosen in by_layer.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def with_one_replaced(model: Transformer, rows: np.ndarray, patterns: Tensor) -> np.ndarray:
    """Loss of each of `rows` (N, T + 1) with one head's attention replaced, for every head: (n_layer, n_head, N), nats.

    What lies below a head's layer is computed once. Leaves the model in eval mode.
    """
    model.eval()
    found = np.zeros((model.config.n_layer, model.config.n_head, len(rows)))
    done = 0
    for idx, targets in device_batches(rows, BATCH, patterns.device):
        part = slice(done, done := done + len(idx))
        for layer, x in enumerate(_block_inputs(model, idx)):
            for head in range(model.config.n_head):
                with replaced(model, [(layer, head)], patterns):
                    found[layer, head, part] = _losses(model, _from_block(model, layer, x), targets)
    return found


@torch.no_grad()
def losses(model: Transformer, rows: np.ndarray) -> np.ndarray:
    """Loss of each of `rows` (N, T + 1), mean over its T targets: (N,), nats."""
    model.eval()
    device = model.wte.weight.device
    return np.concatenate([_losses(model, model.hidden(idx), y) for idx, y in device_batches(rows, BATCH, device)])


def _losses(model: Transformer, hidden: Tensor, targets: Tensor) -> np.ndarray:
    return position_losses(model, hidden, targets).double().mean(dim=1).cpu().numpy()


def _block_inputs(model: Transformer, idx: Tensor) -> list[Tensor]:
    """What each block is given, (B, T, C)."""
    inputs: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.blocks]
    try:
        model.hidden(idx)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _from_block(model: Transformer, layer: int, x: Tensor) -> Tensor:
    """The rest of a forward pass, to the final hidden states: x (B, T, C) goes into block `layer`."""
    for block in list(model.blocks)[layer:]:
        x = block(x, model.rotary, None)
    return model.final_norm(x)


def cost_of_heads(model: Transformer, rows: np.ndarray, other_rows: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
    """Change of the loss (nats) over `rows` (N, T + 1) when attention is replaced, in fp32 and eval mode.

    `uniform`, `mean`: (n_layer, n_head), one head at a time. `all_uniform`, `all_mean`: all heads at once that are
    overloaded by `entropy` (n_layer, n_head); null where there are none. Means are those of `other_rows`. Beside each,
    under `..._error`, its standard error over the sequences.
    """
    assert (rows[:, 1:] != IGNORED).all(), "sequences weigh the same"
    n_layer, n_head, T = model.config.n_layer, model.config.n_head, rows.shape[1] - 1
    device = model.wte.weight.device
    patterns = {
        "uniform": uniform_attention(T, device).expand(n_layer, n_head, T, T),
        "mean": mean_attention(model, other_rows),
    }
    overloaded = [(int(layer), int(head)) for layer, head in np.argwhere(is_overloaded(entropy, T))]
    plain = losses(model, rows)
    found: dict[str, Any] = {"tokens": rows.shape[0] * T, "loss": float(plain.mean()), "overloaded": len(overloaded)}
    for name, pattern in patterns.items():
        found[name], found[f"{name}_error"] = _mean_and_error(with_one_replaced(model, rows, pattern) - plain)
        found[f"all_{name}"] = found[f"all_{name}_error"] = None
        if overloaded:
            with replaced(model, overloaded, pattern):
                mean, error = _mean_and_error(losses(model, rows) - plain)
            found[f"all_{name}"], found[f"all_{name}_error"] = float(mean), float(error)
    return found


def _mean_and_error(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of changes (..., N), over the N sequences: the mean, and its standard error."""
    return changes.mean(axis=-1), changes.std(axis=-1, ddof=1) / math.sqrt(changes.shape[-1])

"""Are overloaded heads wasted? Each head's attention replaced, and what it costs in loss.

A head's attention is replaced by uniform causal attention (row i: 1/(i+1) for each of its keys), and separately by its
own mean over other sequences, which keeps what depends on positions and loses what depends on the text. Values and all
other heads stay. A head whose replacement costs nothing does nothing with what it attends to.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.heads import is_overloaded
from normfree.model import Transformer
from normfree.model.losses import LossOutput
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
    """Loss over `rows` (N, T + 1) with one head's attention replaced, for every head: (n_layer, n_head), nats.

    What lies below a head's layer is computed once. Leaves the model in eval mode.
    """
    model.eval()
    total = torch.zeros(model.config.n_layer, model.config.n_head, dtype=torch.float64, device=patterns.device)
    count = 0
    for idx, targets in device_batches(rows, BATCH, patterns.device):
        for layer, x in enumerate(_block_inputs(model, idx)):
            for head in range(model.config.n_head):
                with replaced(model, [(layer, head)], patterns):
                    out = _from_block(model, layer, x, targets)
                total[layer, head] += out.sum
        count += int(out.count)
    return (total / count).cpu().numpy()


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


def _from_block(model: Transformer, layer: int, x: Tensor, targets: Tensor) -> LossOutput:
    """The rest of a forward pass: x (B, T, C) goes into block `layer`."""
    for block in list(model.blocks)[layer:]:
        x = block(x, model.rotary, None)
    return model.loss(model.final_norm(x), model.head_weight, targets, model.vocab_used)


def cost_of_heads(model: Transformer, rows: np.ndarray, other_rows: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
    """Change of the loss (nats) over `rows` (N, T + 1) when attention is replaced, in fp32 and eval mode.

    `uniform`, `mean`: (n_layer, n_head), one head at a time. `all_uniform`, `all_mean`: all heads at once that are
    overloaded by `entropy` (n_layer, n_head); null where there are none. Means are those of `other_rows`.
    """
    n_layer, n_head, T = model.config.n_layer, model.config.n_head, rows.shape[1] - 1
    device = model.wte.weight.device
    patterns = {
        "uniform": uniform_attention(T, device).expand(n_layer, n_head, T, T),
        "mean": mean_attention(model, other_rows),
    }
    overloaded = [(int(layer), int(head)) for layer, head in np.argwhere(is_overloaded(entropy, T))]
    loss = evaluate_loss(model, rows, BATCH, "fp32")
    found: dict[str, Any] = {"tokens": rows.shape[0] * T, "loss": loss, "overloaded": len(overloaded)}
    for name, pattern in patterns.items():
        found[name] = with_one_replaced(model, rows, pattern) - loss
        found[f"all_{name}"] = None
        if overloaded:
            with replaced(model, overloaded, pattern):
                found[f"all_{name}"] = evaluate_loss(model, rows, BATCH, "fp32") - loss
    return found

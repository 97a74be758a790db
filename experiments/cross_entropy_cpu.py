"""What does the loss cost on the CPU, with all logits at once and a few rows at a time?

    python experiments/cross_entropy_cpu.py

Value and gradients of the loss at the default model's width (96) and vocabulary (8192), 32 sequences of 128 tokens;
medians of interleaved repeats, since the speed of a shared machine drifts. Takes about half a minute.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.model.losses import CrossEntropy, head_logits

TOKENS, WIDTH, VOCABULARY, REPEATS = 32 * 128, 96, 8192, 15


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits (tokens, vocabulary) at once."""
    return F.cross_entropy(head_logits(hidden, weight, VOCABULARY), targets, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As in training."""
    return CrossEntropy()(hidden, weight, targets, VOCABULARY).sum


def seconds(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (0.1 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    times: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(REPEATS + 2):
        times["plain"].append(seconds(plain, hidden, weight, targets))
        times["chunked"].append(seconds(chunked, hidden, weight, targets))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}  # two to warm up
    for name, median in medians.items():
        print(f"{name:8} {1e3 * median:6.0f} ms")
    ratio = medians["plain"] / medians["chunked"]
    print(f"ratio    {ratio:6.2f}   ({torch.get_num_threads()} threads, torch {torch.__version__})")


if __name__ == "__main__":
    main()

"""What does the exact entropy of attention cost on the CPU, beside the attention itself?

    OMP_NUM_THREADS=1 python experiments/entropy_cpu.py
    OMP_NUM_THREADS=2 python experiments/entropy_cpu.py

Forward passes in fp32 of `attention_entropy(q, k)` and of `F.scaled_dot_product_attention(q, k, v, is_causal=True)`;
medians of interleaved repeats, since the speed of a shared machine drifts. Takes about a minute.

Use an idle machine: entropy is some forty parallel calls where attention is one, and where another process takes one
of the two cores, every one of them waits for the thread that lost its own.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.diagnostics import attention_entropy

SHAPES = ((16, 4, 128, 24), (8, 12, 128, 64), (2, 12, 1024, 64), (1, 12, 4096, 64))  # (B, H, T, D)
SECONDS, WARM_UP = 6.0, 3  # of measurement for each shape, and pairs of passes before it


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(*shape: int) -> tuple[float, float]:
    """Of one pass of attention and of its entropy, in seconds."""
    q, k, v = torch.randn(3, *shape)
    passes = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), lambda: attention_entropy(q, k)  # noqa: E731
    for _ in range(WARM_UP):
        pair = [seconds(function) for function in passes]
    repeats = max(5, int(SECONDS / sum(pair)))
    attention, entropy = zip(*[[seconds(function) for function in passes] for _ in range(repeats)], strict=True)
    return statistics.median(attention), statistics.median(entropy)


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'B, H, T, D':>18}  {'attention':>12}  {'entropy':>12}  ratio")
    with torch.no_grad():
        for shape in SHAPES:
            attention, entropy = medians(*shape)
            name = ", ".join(map(str, shape))
            print(f"{name:>18}  {1e3 * attention:9.2f} ms  {1e3 * entropy:9.2f} ms  {entropy / attention:5.2f}")


if __name__ == "__main__":
    main()

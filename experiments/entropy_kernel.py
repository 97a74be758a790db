"""What exact attention entropy costs on a GPU: python experiments/entropy_kernel.py [--out FILE.json] [--tune]

One layer, H = 12, D = 64, bf16 q, k and v on random numbers, strided as the model's are. The kernel returns entropy,
log-sum-exp, maximum score and sink mass of each row; beside it, in the same process, PyTorch's attention forward
(F.scaled_dot_product_attention) and the materialised way (softmax of all scores, in fp32). Medians; the ratios are what
counts. `--tune` tries other tile sizes than `forward_tiles` chooses.
"""

import argparse
import itertools
import json

import torch
import torch.nn.functional as F

from normfree.diagnostics import attention_entropy
from normfree.training.provenance import provenance, versions

SHAPES = ((512, 128), (64, 1024), (8, 8192))  # B x T = 65 536
HEADS, HEAD_DIM, SCALE = 12, 64, 64**-0.5


def milliseconds(function) -> float:
    from triton.testing import do_bench  # Triton comes with PyTorch where there is a GPU

    return do_bench(function, warmup=20, rep=100, return_mode="median")


def materialised(q, k):
    T = q.size(2)
    scores = (q @ k.transpose(-1, -2)).float() * SCALE
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool, device=q.device).tril(), float("-inf"))
    p = scores.softmax(-1)
    return torch.special.entr(p).sum(-1)


def measure(batch: int, T: int) -> dict:
    x = torch.randn(batch, T, 3 * HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    q, k, v = (part.view(batch, T, HEADS, HEAD_DIM).transpose(1, 2) for part in x.chunk(3, -1))
    kernel, sdpa = [], []
    for _ in range(5):  # interleaved, so that a slow moment of the machine meets both
        kernel.append(milliseconds(lambda: attention_entropy(q, k)))
        sdpa.append(milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    row = {"batch": batch, "T": T, "kernel_ms": sorted(kernel)[2], "sdpa_ms": sorted(sdpa)[2]}
    row["ratio_to_sdpa"] = row["kernel_ms"] / row["sdpa_ms"]
    if T <= 1024:
        row["materialised_ms"] = milliseconds(lambda: materialised(q, k))
        row["times_faster"] = row["materialised_ms"] / row["kernel_ms"]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention_entropy(q, k)
    row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def tune(batch: int, T: int) -> None:
    q, k = torch.randn(2, batch, HEADS, T, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    from normfree.diagnostics import entropy_triton

    found = []
    for tiles in itertools.starmap(entropy_triton.Tiles, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))):
        found.append((milliseconds(lambda t=tiles: entropy_triton.forward(q, k, SCALE, 0, t)), tiles))
    for time, tiles in sorted(found)[:5]:
        print(f"  {time:.4f} ms {tiles}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(64, "this measures a GPU, and PyTorch sees no CUDA device here\n")
    rows = [measure(batch, T) for batch, T in SHAPES]
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if options.tune:
            tune(row["batch"], row["T"])
    if options.out:
        import triton

        about = {"device": torch.cuda.get_device_name(), "versions": versions() | {"triton": triton.__version__}}
        with open(options.out, "w") as file:
            json.dump(about | provenance() | {"rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()

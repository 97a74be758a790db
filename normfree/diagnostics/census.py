"""What one look at a layer finds: its attention's heads, and how many elements of a tensor are NaN or Inf.

Custom operators, opaque to torch.compile: a handful of kernels a layer, and loops that are not unrolled into the graph.
None has a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from normfree.diagnostics.entropy import MAX_HEAD_DIM, attention_rows
from normfree.kernels import can_build

SMALL = 4096  # elements


class Summary(NamedTuple):
    """Of each head, over batch and rows: (H,) each. NaN where a row that takes part is NaN."""

    entropy: Tensor  # mean, nats
    sink: Tensor  # mean probability of key 0
    one_minus_max: Tensor  # mean of 1 - max p, without row 0, which sees a single key
    nan_rows: Tensor  # how many rows are NaN
    max_score: Tensor
    q_peak: Tensor  # largest magnitude of the queries
    k_peak: Tensor


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and can_build()


@torch.library.custom_op("normfree::attention_census", mutates_args=())
def _census(q: Tensor, k: Tensor, scale: float, rows_wanted: bool) -> tuple[Tensor, Tensor]:
    if _on_cuda(q) and q.size(-1) <= MAX_HEAD_DIM:
        from normfree.diagnostics import entropy_triton

        summary, entropy = entropy_triton.census(q, k, scale)
        return summary, entropy if rows_wanted else entropy.new_empty(0)
    rows = torch.stack([*attention_rows(q, k, scale=scale), peak(q), peak(k)])
    return _summary_of(rows), rows[0].clone() if rows_wanted else rows.new_empty(0)


def _summary_of(rows: Tensor) -> Tensor:
    """What each row tells, (6, B, H, T), as the summary (H, 8) of the batch; T > 0."""
    entropy, lse, max_score, sink, q_peak, k_peak = rows.unbind()
    one_minus_max = 1 - (max_score - lse).exp()
    columns = [entropy.mean(dim=(0, 2)), sink.mean(dim=(0, 2))]
    columns.append(one_minus_max[:, :, 1:].mean(dim=(0, 2)) if rows.size(3) > 1 else torch.zeros_like(columns[0]))
    columns.append(entropy.isnan().sum(dim=(0, 2)).to(rows.dtype))
    columns += [x.amax(dim=(0, 2)) for x in (max_score, q_peak, k_peak)]
    return torch.stack([*columns, torch.zeros_like(columns[0])], dim=1)


@_census.register_fake
def _(q: Tensor, k: Tensor, scale: float, rows: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.size(1), 8), dtype=dtype), q.new_empty(q.shape[:-1] if rows else (0,), dtype=dtype)


@torch.library.custom_op("normfree::summarize", mutates_args=())
def _summarize(rows: Tensor) -> Tensor:
    if not rows.is_cuda:
        return _summary_of(rows)
    from normfree.diagnostics import entropy_triton

    return entropy_triton.summarize(rows)


@_summarize.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.size(2), 8)


class Census:
    """Of one layer's attention in one forward pass."""

    def __init__(self, heads: Tensor, entropy: Tensor) -> None:
        self.heads = heads  # (H, 8): the columns of `Summary`, and an empty one
        self.entropy = entropy  # (B, H, T), or empty

    @classmethod
    def take(cls, q: Tensor, k: Tensor, scale: float, rows: bool) -> "Census":
        """q, k (B, H, T, D), any strides."""
        return cls(*_census(q.detach(), k.detach(), scale, rows))

    @classmethod
    def of_rows(cls, rows: Tensor) -> "Census":
        """What `normfree.kernels.attention.packed_attention` saw: (6, B, H, T)."""
        return cls(_summarize(rows.detach()), rows[0].detach())

    @property
    def summary(self) -> Summary:
        return Summary(*self.heads[:, :7].unbind(1))


def peak(x: Tensor) -> Tensor:
    """Largest magnitude over the last dimension; NaN where there is one: (..., C) -> (...)."""
    return torch.linalg.vector_norm(x, ord=float("inf"), dim=-1)


@torch.library.custom_op("normfree::count_non_finite", mutates_args=())
def count_non_finite(x: Tensor, gate: Tensor) -> Tensor:
    """NaN and Inf elements of x: (parts, 2) int64, to be added up.

    `gate`, 0-d: finite only where all of x is, such as its largest magnitude; then nothing is read. So counting
    costs a healthy step next to nothing.
    """
    if _on_cuda(x):
        from normfree.diagnostics import counts_triton

        return counts_triton.count_non_finite(x, gate)
    if gate.isfinite():
        return torch.zeros(1, 2, dtype=torch.int64, device=x.device)
    return torch.stack([x.isnan().sum(), x.isinf().sum()])[None]


def count_many(tensors: list[Tensor], gates: Tensor) -> Tensor:
    """`count_non_finite` of each tensor, all contiguous, with a gate each: (tensors, 2) int64."""
    if _on_cuda(tensors[0]):
        from normfree.diagnostics import counts_triton

        return counts_triton.count_many(tensors, gates)
    return torch.cat([count_non_finite(t, gate) for t, gate in zip(tensors, gates.unbind(), strict=True)])


@count_non_finite.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    if _on_cuda(x):
        from normfree.diagnostics.counts_triton import COUNTERS

        return x.new_empty((COUNTERS, 2), dtype=torch.int64)
    return x.new_empty((1, 2), dtype=torch.int64)


@torch.library.custom_op("normfree::stack", mutates_args=())
def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors)


@_stack.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors)


def stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack; of small tensors in one kernel, where a compiler would write one for each."""
    return _stack(tensors) if tensors[0].numel() <= SMALL else torch.stack(tensors)

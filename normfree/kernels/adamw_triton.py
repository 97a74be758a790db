"""AdamW for many tensors at once on CUDA; imported for CUDA tensors only, by `normfree.training.optimizer`.

PyTorch's fused AdamW takes what fits into a launch's arguments, a few dozen tensors at a time, and writes gradients
back as it divides them. Here the addresses are a table on the device: one launch, and a small one before it that
counts steps, which write what they have to.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK = 1024  # elements of a program: of 1024 to 8192, measured on an H200, the fastest
ALIGNED = 16  # bytes: each thread moves as many at a time
COLUMNS = 6  # of the table


@triton.jit
def _at(address, start, lanes):
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16) + tl.multiple_of(start, 16) + lanes


@triton.jit
def _update(weight, gradient, first, second, inside, divisor, decay, rate, beta1, new1, beta2, new2, correction2, eps):
    g = tl.load(gradient, mask=inside) / divisor
    p = tl.load(weight, mask=inside) * decay
    m = tl.load(first, mask=inside)
    v = tl.load(second, mask=inside)
    m = m * beta1 + g * new1
    v = v * beta2 + g * g * new2
    p -= rate * m / (tl.sqrt(v / correction2) + eps)
    tl.store(weight, p, mask=inside)
    tl.store(first, m, mask=inside)
    tl.store(second, v, mask=inside)


@triton.jit
def _adamw(
    TABLE, TENSORS, BLOCKS, MASK, DIVISOR, lr, beta1, new1, beta2, new2, log_beta1, log_beta2, eps, weight_decay,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor. A row of TABLE has the addresses of weight, gradient, both moments and step, and the
    number of elements. Where MASK is not 0 nothing is done. new1, new2: 1 - beta1, 1 - beta2, rounded once: as
    differences of float32 they would be a hundredth of a thousandth off, and the moments with them.
    """
    if tl.load(MASK) == 0.0:
        row = TABLE + tl.load(TENSORS + tl.program_id(0)).to(tl.int64) * COLUMNS
        start = tl.load(BLOCKS + tl.program_id(0)).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        weight, gradient = _at(row, start, lanes), _at(row + 1, start, lanes)
        first, second = _at(row + 2, start, lanes), _at(row + 3, start, lanes)
        step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
        rate = lr / -libdevice.expm1(step * log_beta1)  # 1 - beta^step, as a difference, would lose digits
        correction2 = -libdevice.expm1(step * log_beta2)
        left = tl.load(row + 5) - start
        divisor, decay = tl.load(DIVISOR), 1.0 - lr * weight_decay
        if left >= BLOCK:
            _update(
                weight, gradient, first, second, None, divisor, decay, rate, beta1, new1, beta2, new2, correction2, eps,
            )  # fmt: skip
        else:
            inside = lanes < left
            _update(
                weight, gradient, first, second, inside, divisor, decay, rate, beta1, new1, beta2, new2, correction2,
                eps,
            )  # fmt: skip


@triton.jit
def _adamw_steps(TABLE, N, MASK, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One more step of each of the N tensors, where MASK is 0."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < N
    step = tl.load(TABLE + tensor * COLUMNS + 4, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    tl.store(step, tl.load(step, mask=inside, other=0.0) + (1.0 - tl.load(MASK)), mask=inside)


@cache
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each program's tensor, and its block within it: int32."""
    counts = torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    blocks = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return tensors.int().to(device), blocks.int().to(device)


def _ready(x: Tensor) -> Tensor:
    """As the kernel reads it; a gradient may be a part of another tensor."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    mask: Tensor,
    divisor: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update parameters and moments in place, as `torch._fused_adamw_` does; all float32 on one device.

    `steps`, each 0-d, are the updates before this one, and count it then. Gradients are divided by `divisor`, 0-d, and
    stay as they are. Where `mask`, 0-d, is not 0, nothing is changed.
    """
    grads = [_ready(g) for g in grads]
    columns = [params, grads, firsts, seconds]
    assert all(x.dtype == torch.float32 and x.is_contiguous() for column in [*columns, steps] for x in column)
    assert all(x.data_ptr() % ALIGNED == 0 for column in columns for x in column)
    sizes = tuple(p.numel() for p in params)
    rows = [[x.data_ptr() for x in row] for row in zip(*columns, steps, strict=True)]
    rows = [[*row, n] for row, n in zip(rows, sizes, strict=True)]
    device, (beta1, beta2) = params[0].device, betas
    logs = (math.log(beta) if beta else -math.inf for beta in betas)
    scalars = lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, *logs, eps, weight_decay
    table = torch.tensor(rows, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
    tensors, blocks = _blocks(sizes, device)
    with torch.cuda.device(device):
        _adamw_steps[(triton.cdiv(len(rows), 128),)](table, len(rows), mask, COLUMNS=COLUMNS, BLOCK=128)
        _adamw[(len(tensors),)](
            *(table, tensors, blocks, mask, divisor, *scalars),
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
            num_warps=4,
        )

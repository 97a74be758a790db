"""Linear layers in half precision with float32 weights.

A weight's gradient leaves its matrix product in float32: nothing is rounded on the way, and no cast runs after it.

In a feed-forward layer the activation's gradient is taken in the epilogue of proj's, and relu itself in fc's: there the
derivative is known from the output, y > 0, and what lies before it is never written.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations that can run inside the products.
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _half(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


@torch.library.custom_op("normfree::weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x in float32: (M, N), (M, K) -> (N, K)"""
    if grad.is_cuda and grad.dtype != torch.float32:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return torch.mm(grad.float().t(), x.float())


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return grad.new_empty(grad.size(1), x.size(1), dtype=torch.float32)


@torch.library.custom_op("normfree::linear_relu", mutates_args=())
def _linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """relu(x weight^T + bias), in cuBLAS's epilogue: (M, K), (N, K), (N,) -> (M, N)"""
    if bias is None:
        return torch.mm(x, weight.t()).relu_()
    return torch._addmm_activation(bias, x, weight.t())


@_linear_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@torch.library.custom_op("normfree::gradient_product", mutates_args=())
def _gradient_product(grad: Tensor, weight: Tensor, saved: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(grad weight) act'(x), its column sums, and act(x); `saved` is x, for relu its output, and then act(x) is empty.

    grad (M, K), weight (K, N), saved (M, N) -> (M, N), (N,) float32, (M, N)
    """
    if grad.is_cuda:
        from normfree.kernels import linear_triton

        return linear_triton.gradient_product(grad.contiguous(), weight.contiguous(), saved, act)
    out = grad @ weight
    if act == "relu":
        out = torch.where(saved > 0, out, 0.0)
        return out, out.float().sum(0), saved.new_empty(0)
    x = saved.float()
    out = (out.float() * torch.func.jvp(ACTS[act], (x,), (torch.ones_like(x),))[1]).to(saved.dtype)
    return out, out.float().sum(0), ACTS[act](x).to(saved.dtype)


@_gradient_product.register_fake
def _(grad: Tensor, weight: Tensor, saved: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    sums = saved.new_empty(saved.size(1), dtype=torch.float32)
    return saved.new_empty(saved.shape), sums, saved.new_empty((0,) if act == "relu" else saved.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, _half(bias, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        bias = grad.sum(0, dtype=torch.float32) if ctx.biased else None
        return torch.mm(grad, weight), weight_gradient(grad, x), bias


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_1: Tensor, b_1: Tensor | None, w_2: Tensor, b_2: Tensor | None, act: str
    ) -> Tensor:
        w_1, w_2 = w_1.to(x.dtype), w_2.to(x.dtype)
        if act == "relu":
            hidden = saved = _linear_relu(x, w_1, _half(b_1, x.dtype))
        else:
            saved = _product(x, w_1, _half(b_1, x.dtype))
            hidden = ACTS[act](saved)
        ctx.save_for_backward(x, w_1, w_2, saved)
        ctx.act, ctx.biased = act, (b_1 is not None, b_2 is not None)
        return _product(hidden, w_2, _half(b_2, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_1, w_2, saved = ctx.saved_tensors
        (grad,) = grads
        inner, sums, hidden = _gradient_product(grad, w_2, saved, ctx.act)
        hidden = saved if ctx.act == "relu" else hidden
        b_1 = sums if ctx.biased[0] else None
        b_2 = grad.sum(0, dtype=torch.float32) if ctx.biased[1] else None
        return torch.mm(inner, w_1), weight_gradient(inner, x), b_1, weight_gradient(grad, hidden), b_2, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in the precision of x: (..., K), float32 (N, K) and (N,) -> (..., N)."""
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def feed_forward(x: Tensor, w_1: Tensor, b_1: Tensor | None, w_2: Tensor, b_2: Tensor | None, act: str) -> Tensor:
    """act(x w_1^T + b_1) w_2^T + b_2 in the precision of x: (..., C), float32 (N, C) and (C, N) -> (..., C)."""
    return _FeedForward.apply(x.flatten(0, -2), w_1, b_1, w_2, b_2, act).unflatten(0, x.shape[:-1])

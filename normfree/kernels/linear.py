"""Linear layers in half precision with float32 weights.

A weight's gradient leaves its matrix product in float32: nothing is rounded on the way, and no cast runs after it.

In a feed-forward layer relu runs in the epilogue of fc's product, and its gradient in that of proj's: the derivative is
known from the output, y > 0, and what lies before it is never written. Of any other activation the derivative is
written beside the value, while the input is at hand, so that the epilogue has one multiplication to do: the two dozen
instructions of a GELU would take longer there than the product.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))  # the normal distribution function
    return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.sqrt(8 / math.pi)
    share = torch.sigmoid(scale * (x + 0.044715 * x * x * x))  # (1 + tanh u) / 2 is the logistic function of 2u
    return x * share, share + x * share * (1.0 - share) * scale * (1.0 + 3 * 0.044715 * x * x)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(x)
    return x * share, share * (1.0 + x * (1.0 - share))


def _relu2(x: Tensor) -> tuple[Tensor, Tensor]:
    positive = torch.relu(x)
    return positive * positive, 2.0 * positive


# Value and derivative of the activations that have one to write.
BESIDE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
    "silu": _silu,
}
ACTS = ("relu", *BESIDE)  # what `feed_forward` takes
SUMMED = 128  # rows whose columns a program of the gradient's product adds up


def _half(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x in float32: (M, N), (M, K) -> (N, K)"""
    if grad.is_cuda and grad.dtype != torch.float32:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return torch.mm(grad.float().t(), x.float())


# The gradients of a layer's input and weight come from one operator: the compiler makes a copy of what they are taken
# from for each operator that reads it.
@torch.library.custom_op("normfree::linear_gradients", mutates_args=())
def _linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight in float32: (M, N), (M, K), (N, K) -> (M, K), (N, K)"""
    grad = grad.contiguous()
    return torch.mm(grad, weight), _weight_gradient(grad, x)


@_linear_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


@torch.library.custom_op("normfree::linear_relu", mutates_args=())
def _linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """relu(x weight^T + bias), in cuBLAS's epilogue: (M, K), (N, K), (N,) -> (M, N)"""
    if bias is None:
        return torch.mm(x, weight.t()).relu_()
    return torch._addmm_activation(bias, x, weight.t())


@_linear_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@torch.library.custom_op("normfree::projection_gradients", mutates_args=())
def _projection_gradients(
    grad: Tensor, weight: Tensor, hidden: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through proj and the activation: inner = (grad weight) * slope; sums of its columns, each over `SUMMED`
    rows; and the gradient of proj's weight. The last two are float32.

    grad (M, K), weight (K, N), hidden and slope (M, N) -> (M, N), (M / SUMMED, N), (K, N). Without a slope the
    activation is relu, and hidden says where its slope is 1.
    """
    grad, of = grad.contiguous(), hidden if slope is None else slope
    if grad.is_cuda:
        from normfree.kernels import linear_triton

        inner, sums = linear_triton.gradient_product(grad, weight.contiguous(), of, slope is None, SUMMED)
    else:
        exact = (grad @ weight).float() * (hidden > 0 if slope is None else slope).float()
        inner, sums = exact.to(hidden.dtype), torch.stack([rows.sum(0) for rows in exact.split(SUMMED)])
    return inner, sums, _weight_gradient(grad, hidden)


@_projection_gradients.register_fake
def _(grad: Tensor, weight: Tensor, hidden: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    M, N = hidden.shape
    sums = weight.new_empty(-(-M // SUMMED), N, dtype=torch.float32)
    return hidden.new_empty(M, N), sums, weight.new_empty(weight.shape, dtype=torch.float32)


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
        return *_linear_gradients(grad, x, weight), bias


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, beta: float, look: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """h = x weight^T + bias, where it is at hand or to be looked at; act(beta h) / beta; its slope, but of relu."""
    if act == "relu":  # relu(beta h) / beta is relu(h)
        if not look:
            return None, _linear_relu(x, weight, bias), None
        before = _product(x, weight, bias)
        return before, before.relu(), None
    before = _product(x, weight, bias)
    value, slope = BESIDE[act](beta * before.float())
    return before, (value / beta).to(x.dtype), slope.to(x.dtype)


class _FeedForward(torch.autograd.Function):
    """The output; with `look` also what lies before and after the activation, through which no gradient comes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_1: Tensor, b_1: Tensor | None, w_2: Tensor, b_2: Tensor | None, *how: Any
    ) -> tuple[Tensor, ...]:
        act, beta, look = how
        w_1, w_2 = w_1.to(x.dtype), w_2.to(x.dtype)
        ctx.biased = b_1 is not None, b_2 is not None
        ctx.set_materialize_grads(False)  # of what is looked at there is none
        before, hidden, slope = _activated(x, w_1, _half(b_1, x.dtype), act, beta, look)
        ctx.save_for_backward(x, w_1, w_2, hidden, *([] if slope is None else [slope]))
        y = _product(hidden, w_2, _half(b_2, x.dtype))
        if not look:
            return (y,)
        assert before is not None
        ctx.mark_non_differentiable(before, hidden)
        return y, before, hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_1, w_2, hidden, *rest = ctx.saved_tensors
        grad = grads[0]
        inner, sums, grad_w_2 = _projection_gradients(grad, w_2, hidden, rest[0] if rest else None)
        grad_x, grad_w_1 = _linear_gradients(inner, x, w_1)
        b_1 = sums.sum(0) if ctx.biased[0] else None
        b_2 = grad.sum(0, dtype=torch.float32) if ctx.biased[1] else None
        return grad_x, grad_w_1, b_1, grad_w_2, b_2, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in the precision of x: (..., K), float32 (N, K) and (N,) -> (..., N)."""
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def feed_forward(
    x: Tensor,
    w_1: Tensor,
    b_1: Tensor | None,
    w_2: Tensor,
    b_2: Tensor | None,
    act: str,
    beta: float = 1.0,
    look: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """act(beta h) / beta w_2^T + b_2 with h = x w_1^T + b_1, in the precision of x; with `look` beside it h and what
    the activation makes of it, which have no gradient.

    x (..., C), float32 (N, C), (N,), (C, N) and (C,) -> (..., C) and twice (..., N); `act` is one of `ACTS`.
    """
    found = _FeedForward.apply(x.flatten(0, -2), w_1, b_1, w_2, b_2, act, beta, look)
    y, *seen = (each.unflatten(0, x.shape[:-1]) for each in found)
    return y, (seen[0], seen[1]) if look else None

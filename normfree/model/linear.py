"""Linear layers, with the fast path of training in half precision."""

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.kernels import autocast_dtype
from normfree.kernels import linear as kernel


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    half = autocast_dtype(x)
    return kernel.linear(x.to(half), weight, bias) if fast and half is not None else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` with a fast path."""

    fast = False

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.fast)

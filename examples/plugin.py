"""A norm and a statistic of your own: python run.py --plugin examples/plugin.py model.norm=max_abs"""

from torch import Tensor

from normfree import register_norm, register_statistic
from normfree.diagnostics import Observation, Statistic
from normfree.model.norms import RMSNorm


@register_norm("max_abs")
class MaxAbs(RMSNorm):  # which has `weight` (C,) and `eps`
    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return x * self.weight / (x.abs().amax(dim=-1, keepdim=True) + self.eps)


@register_statistic("resid_median")
class ResidualMedian(Statistic):
    def measure(self, seen: Observation) -> Tensor:  # one number a layer, from each block's output
        return seen.output.abs().median()

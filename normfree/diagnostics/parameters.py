"""Statistics of gradients, weights and updates: measured around the optimizer's step, outside the compiled one."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from normfree.diagnostics.census import count_many
from normfree.model import Transformer
from normfree.tables import STATISTICS


class Tensors:
    """The gradients, weights or updates of all parameters; what several statistics ask for is computed once."""

    def __init__(self, tensors: list[Tensor], norms: Tensor | None = None) -> None:
        self.tensors = tensors
        self._norms = norms
        self._counts: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """(tensors,)"""
        if self._norms is None:
            self._norms = torch.stack(torch._foreach_norm(self.tensors)).float()
        return self._norms

    @property
    def counts(self) -> Tensor:
        """NaN and Inf elements: (tensors, 2) int64."""
        if self._counts is None:
            self._counts = count_many(self.tensors, self.norms)
        return self._counts


class ParameterStatistic:
    """One number for each parameter's gradient, weight or update, put together by layer. Outside the compiled step."""

    of: Literal["gradient", "parameter", "update"] = "gradient"
    by_layer: Literal["sum", "norm"] = "sum"  # how the numbers of a layer's parameters become one
    outside = False  # whether a last number stands for what is in no block: embeddings, final norm, head, shared slope
    dtype = torch.float32
    unit = ""

    def measure(self, seen: Tensors) -> Tensor:
        """(tensors,); nothing may wait for the device."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")


class GradientNorm(ParameterStatistic):
    """Norm of the gradient of each block, before clipping."""

    by_layer = "norm"

    def measure(self, seen: Tensors) -> Tensor:
        return seen.norms


class UpdateNorm(GradientNorm):
    """Norm of what the optimizer added to the weights of each block.

    0 where the step was masked; NaN where a weight is not finite.
    """

    of = "update"


class GradientNaNCount(ParameterStatistic):
    """NaN elements among the gradients."""

    outside = True
    dtype = torch.int64
    unit = "elements"

    def measure(self, seen: Tensors) -> Tensor:
        return seen.counts[:, 0]


class GradientInfCount(GradientNaNCount):
    """Infinite elements among the gradients."""

    def measure(self, seen: Tensors) -> Tensor:
        return seen.counts[:, 1]


class ParameterNaNCount(GradientNaNCount):
    """NaN elements among the weights."""

    of = "parameter"


class ParameterInfCount(GradientInfCount):
    """Infinite elements among the weights."""

    of = "parameter"


class ParameterRecorder:
    """Statistics of each layer's gradients, weights and updates, around the optimizer's step."""

    def __init__(self, model: Transformer, names: Sequence[str]) -> None:
        self.statistics: dict[str, ParameterStatistic] = {name: STATISTICS[name]() for name in names}
        self.n_layer = model.config.n_layer
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        layers = [int(name.split(".")[1]) if name.startswith("blocks.") else self.n_layer for name, _ in named]
        self.layers = torch.tensor(layers, device=self.parameters[0].device)  # n_layer: in no block
        self._minus_before: list[Tensor] = []
        self.failed: dict[str, str] = {}  # statistics that are left out from then on, and why

    def _names(self, of: str) -> list[str]:
        return [name for name, s in self.statistics.items() if s.of == of]

    def _measure(self, of: str, tensors: list[Tensor], norms: Tensor | None = None) -> list[Tensor]:
        """A vector (n_layer + 1,), float64, for each statistic of that kind."""
        seen, rows = Tensors(tensors, norms), []
        for name in self._names(of):
            total = torch.zeros(self.n_layer + 1, dtype=torch.float64, device=self.layers.device)
            try:
                rows.append(self._by_layer(self.statistics[name], seen, total))
            except Exception as error:  # whatever somebody's statistic raises; it costs itself, not the run
                self.failed.setdefault(name, f"{type(error).__name__}: {error}")
                rows.append(total)
        return rows

    def _by_layer(self, statistic: ParameterStatistic, seen: Tensors, total: Tensor) -> Tensor:
        values = statistic.measure(seen).double()
        if statistic.by_layer == "norm":
            return total.index_add_(0, self.layers, values.square()).sqrt()
        return total.index_add_(0, self.layers, values)

    def before_update(self, grad_norms: Tensor, weight_peaks: Tensor) -> list[Tensor]:
        """After the backward pass: what is said of gradients and weights.

        `grad_norms`, `weight_peaks`: norm of each gradient, largest magnitude of each weight, which are known already.
        """
        parts = []
        if self._names("gradient"):
            parts += self._measure("gradient", [p.grad for p in self.parameters if p.grad is not None], grad_norms)
        weights = [p.detach() for p in self.parameters]
        if self._names("parameter"):
            parts += self._measure("parameter", weights, weight_peaks)
        if self._names("update"):
            self._minus_before = list(torch._foreach_neg(weights))
        return parts

    def after_update(self) -> list[Tensor]:
        """After the optimizer's step: what is said of the updates."""
        if not self._names("update"):
            return []
        updates, self._minus_before = self._minus_before, []
        torch._foreach_add_(updates, [p.detach() for p in self.parameters])
        return self._measure("update", updates)

    def size(self) -> int:
        return len(self.statistics) * (self.n_layer + 1)

    def unpack(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The arrays of what `before_update` and `after_update` gave, joined and on the host."""
        names = [name for of in ("gradient", "parameter", "update") for name in self._names(of)]
        arrays = {}
        for name, row in zip(names, flat.numpy().reshape(-1, self.n_layer + 1), strict=True):
            if name in self.failed:
                continue
            statistic = self.statistics[name]
            dtype = np.int64 if statistic.dtype == torch.int64 else np.float32
            arrays[name] = row[: None if statistic.outside else -1].astype(dtype)
        return arrays

    def axes(self, name: str) -> tuple[str, ...]:
        return ("layer_or_outside",) if self.statistics[name].outside else ("layer",)

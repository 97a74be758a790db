"""Statistics of one layer, measured on what the step itself computed. Add one: a class and a line in `STATISTICS`.

| statistic    | cost of one record                                                         |
|--------------|-----------------------------------------------------------------------------|
| attn_entropy | the scores Q K^T once more, and three passes over them, chunk by chunk       |
| nan_count    | one pass over each site's output (attn_probs: free beside attn_entropy)      |
| inf_count    | one pass over each site's output                                             |
"""

from typing import Literal

import torch
from torch import Tensor

from normfree.config import ModelConfig
from normfree.diagnostics.entropy import attention_entropy
from normfree.runs import SITES


class Observation:
    """What one module computed in one forward pass.

    `site` is one of "block", "attn", "mlp" (then `output` is the module's, (B, T, C)) or "attn_probs" (then `output`
    is the heads' (B, H, T, D), and `q`, `k` are what the attention used; `entropy` follows from them).
    """

    def __init__(self, site: str, output: Tensor, q: Tensor | None = None, k: Tensor | None = None, **attention: float):
        self.site = site
        self.output = output.detach()
        self.q = q
        self.k = k
        self.attention = attention
        self._entropy: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """(B, H, T), nats; NaN where the row's probabilities are NaN. Computed once, whoever asks."""
        if self._entropy is None:  # by hand: functools.cached_property holds a lock, which torch.compile refuses
            assert self.q is not None
            assert self.k is not None
            self._entropy = attention_entropy(self.q, self.k, **self.attention)  # type: ignore[arg-type]
        return self._entropy


class Statistic:
    """A small array for each layer. Subclasses set the class attributes and `measure`."""

    sites: tuple[str, ...] = ("block",)  # where it is measured; several sites add a leading axis
    over_micro_batches: Literal["mean", "sum", "max"] = "mean"
    dtype = torch.float32
    axes: tuple[str, ...] = ()  # names of the axes of `shape`
    unit = ""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer's value."""
        return ()

    def measure(self, seen: Observation) -> Tensor:
        """A tensor of `shape`. Runs inside the compiled step: no .item(), no data-dependent control flow."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")


class AttentionEntropy(Statistic):
    """Mean entropy of each head's attention over batch and query positions. A NaN row makes its head NaN."""

    sites = ("attn_probs",)
    axes = ("head",)
    unit = "nats"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.n_head,)

    def measure(self, seen: Observation) -> Tensor:
        return seen.entropy.mean(dim=(0, 2))


class ElementCount(Statistic):
    """How many elements of each site's output have a property, over the whole optimizer step."""

    sites = SITES
    over_micro_batches = "sum"
    dtype = torch.int64
    unit = "elements"


class NaNCount(ElementCount):
    """NaN elements at each site. attn_probs: a row with a NaN holds T of them, as in a materialised softmax."""

    def measure(self, seen: Observation) -> Tensor:
        if seen.site == "attn_probs":
            return seen.entropy.isnan().sum() * seen.entropy.size(2)
        return seen.output.isnan().sum()


class InfCount(ElementCount):
    """Infinite elements at each site; probabilities never are."""

    def measure(self, seen: Observation) -> Tensor:
        if seen.site == "attn_probs":
            return torch.zeros((), dtype=torch.int64, device=seen.output.device)
        return seen.output.isinf().sum()

"""Statistics of one layer, measured on what the step itself computed. Add one: a class and a line in `STATISTICS`.

"Every step" is what `diagnostics.watch=all` measures at every step, for the flight recorder; the rest is measured every
`diagnostics.every` steps; "(snapshots)" are written at snapshots only, but measured with each record, so that there is
one compiled step less. Those of gradients, weights and updates are in `parameters`. Costs are those of one measurement;
experiments/diagnostics_cost.py measures them together.

| statistic         | every step     | cost                                                                       |
|-------------------|----------------|----------------------------------------------------------------------------|
| attn_entropy      | yes            | the census: Q K^T once more, less than one attention forward pass           |
| max_score         | yes            | nothing beside the census                                                  |
| sink_mass         |                | nothing beside the census                                                  |
| one_minus_max     |                | nothing beside the census                                                  |
| nan_count         | of the block   | nothing where all is finite, else one pass over the site                   |
| inf_count         | of the block   | in the same pass                                                           |
| peak              | q k attn mlp   | q, k: within the census; elsewhere one pass, shared with what reads it next |
| resid_max         | yes            | one pass over the block's output, shared with that addition                |
| resid_rms         |                | in the same pass                                                           |
| mlp_pre_std       |                | one pass over at most `SAMPLED_ROWS` tokens                                |
| position_entropy  | (snapshots)    | a mean over the batch of the census's rows                                 |
| entropy_quantiles | (snapshots)    | a sort of at most `SAMPLED_ROWS` rows a head                              |
| effective_width   | (snapshots)    | one exp a row                                                              |
| grad_norm         |                | one pass over the gradients                                                |
| update_norm       |                | a copy of the weights, and one pass over the difference                    |
| grad_*_count      |                | nothing where the norm is finite, else one pass over the gradient          |
| param_*_count     |                | one pass over the weights                                                  |
"""

from typing import Literal

import torch
from torch import Tensor

from normfree.config import ModelConfig
from normfree.diagnostics.census import Census, Summary, count_non_finite, peak
from normfree.heads import QUANTILES
from normfree.runs import SITES

SAMPLED_ROWS = 8192


class Observation:
    """What one module computed in one forward pass.

    `site`: "block", "attn", "mlp" (then `output` is the module's, (B, T, C)), "mlp_pre", "mlp_hidden" (before and
    after the activation, (B, T, n_inner)), "q", "k", "v" or "attn_probs" (then `output` is that tensor, and for
    attn_probs the heads' outputs, (B, H, T, D)). What several statistics ask for is computed once: `functools` has
    a cached_property for that, but it holds a lock, which torch.compile refuses.
    """

    def __init__(
        self, site: str, output: Tensor, census: Census | None = None, gate: "Observation | None" = None
    ) -> None:
        self.site = site
        self.output = output.detach()
        self._gate = gate  # what is finite only where this is: nothing is counted there, nor read
        self._census = census
        self._largest: Tensor | None = None
        self._counts: Tensor | None = None

    @property
    def census(self) -> Census:
        assert self._census is not None, f"{self.site} is not inside an attention"
        return self._census

    @property
    def entropy(self) -> Tensor:
        """(B, H, T), nats; NaN where the row's probabilities are NaN. At the level "record" only."""
        return self.census.entropy

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of `output`, 0-d; NaN where there is one."""
        if self._largest is None:
            if self.site in ("q", "k"):
                summary = self.census.summary
                self._largest = (summary.q_peak if self.site == "q" else summary.k_peak).amax()
            else:
                self._largest = peak(self.output).amax()
        return self._largest

    @property
    def counts(self) -> Tensor:
        """NaN and Inf elements of `output`: (parts, 2) int64, to be added up."""
        if self._counts is None:
            self._counts = count_non_finite(self.output, (self._gate or self).largest)
        return self._counts


class Statistic:
    """A small array for each layer. Subclasses set the class attributes and `measure`."""

    sites: tuple[str, ...] = ("block",)  # where it is measured; several sites add a leading axis
    every_step: tuple[str, ...] = ()  # sites at which it is measured at every step too
    snapshot = False  # written at snapshots only
    over_micro_batches: Literal["mean", "sum", "max"] = "mean"
    dtype = torch.float32
    axes: tuple[str, ...] = ()  # names of the axes of `shape`
    unit = ""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        self.config = config
        self.seq_len = seq_len

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer's value."""
        return ()

    def measure(self, seen: Observation) -> Tensor:
        """One layer's value. Runs inside the compiled step: no .item(), no data-dependent control flow."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")

    def finish(self, values: Tensor) -> Tensor:
        """What `measure` gave in every layer, stacked, to (n_layer, *shape): for the part that all can do at once."""
        return values


# -- attention ---------------------------------------------------------------------------------------------------------


class HeadStatistic(Statistic):
    """One number a head: a column of the census's `Summary`, taken once all layers are together."""

    sites = ("attn_probs",)
    axes: tuple[str, ...] = ("head",)
    column = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.n_head,)

    def measure(self, seen: Observation) -> Tensor:
        return seen.census.heads  # (H, 8)

    def finish(self, values: Tensor) -> Tensor:
        return values[..., Summary._fields.index(self.column)]


class AttentionEntropy(HeadStatistic):
    """Mean entropy of each head's attention over batch and query positions. A NaN row makes its head NaN."""

    every_step = ("attn_probs",)
    unit = "nats"
    column = "entropy"


class MaxScore(HeadStatistic):
    """Largest attention score before the softmax."""

    every_step = ("attn_probs",)
    over_micro_batches = "max"
    column = "max_score"


class SinkMass(HeadStatistic):
    """Mean probability that queries give to key 0, the attention sink (Xiao et al., arXiv:2309.17453)."""

    unit = "probability"
    column = "sink"


class OneMinusMax(HeadStatistic):
    """Mean over rows of 1 - max_j p_j: near 0, attention is nearly one-hot. Row 0, which sees one key, stays out."""

    unit = "probability"
    column = "one_minus_max"


class RowStatistic(HeadStatistic):
    """Of the entropies of single rows, which a record has and the watch has not. Snapshots only."""

    snapshot = True

    def measure(self, seen: Observation) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")

    def finish(self, values: Tensor) -> Tensor:
        return values


class PositionEntropy(RowStatistic):
    """Mean entropy of each head at each query position, over the batch."""

    axes = ("head", "position")
    unit = "nats"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.n_head, self.seq_len)

    def measure(self, seen: Observation) -> Tensor:
        return seen.entropy.mean(dim=0)


class EntropyQuantiles(RowStatistic):
    """Quantiles (`heads.QUANTILES`) over rows of r_i = H_i / ln(i + 1), how near each row comes to its own ceiling.

    Row 0 has no ceiling and stays out. Over at most `SAMPLED_ROWS` rows a head, or one sequence: the first ones.
    Several micro-batches: the mean of their quantiles.
    """

    axes = ("head", "quantile")
    unit = "share of the row's ceiling"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.n_head, len(QUANTILES))

    def measure(self, seen: Observation) -> Tensor:
        return seen.entropy[: max(1, SAMPLED_ROWS // self.seq_len)]  # (sequences, H, T)

    def finish(self, values: Tensor) -> Tensor:
        if self.seq_len == 1:
            return torch.full((len(values), *self.shape), float("nan"), device=values.device)
        ceiling = torch.arange(2, self.seq_len + 1, device=values.device).float().log()
        level = (values[..., 1:] / ceiling).transpose(1, 2).flatten(2)  # (n_layer, H, rows)
        ordered, last = level.sort(dim=2).values, level.size(2) - 1
        # By hand, as torch.quantile takes its fractions from a tensor, which would be sent to the device each time.
        found = [
            ordered[..., int(q * last)].lerp(ordered[..., min(int(q * last) + 1, last)], q * last % 1)
            for q in QUANTILES
        ]
        return torch.where(level.isnan().any(2, keepdim=True), float("nan"), torch.stack(found, dim=-1))


class EffectiveWidth(RowStatistic):
    """Mean of exp(H): over how many keys a head spreads its attention."""

    unit = "keys"

    def measure(self, seen: Observation) -> Tensor:
        return seen.entropy.exp().mean(dim=(0, 2))


# -- magnitudes --------------------------------------------------------------------------------------------------------


class ElementCount(Statistic):
    """How many elements of each site's output have a property, over the whole optimizer step."""

    sites = SITES
    every_step = ("block",)
    over_micro_batches = "sum"
    dtype = torch.int64
    unit = "elements"
    column: int

    def measure(self, seen: Observation) -> Tensor:
        if seen.site != "attn_probs":
            return seen.counts
        # (H,), in float64: in float32 a product above 2^24 would be rounded
        nan = seen.census.heads[:, Summary._fields.index("nan_rows")].double() * self.seq_len
        return torch.stack([nan, torch.zeros_like(nan)], dim=1)  # probabilities are never infinite

    def finish(self, values: Tensor) -> Tensor:
        return values[..., self.column].double().sum(1)


class NaNCount(ElementCount):
    """NaN elements at each site. attn_probs: a row with a NaN holds T of them, as in a materialised softmax."""

    column = 0


class InfCount(ElementCount):
    """Infinite elements at each site; probabilities never are."""

    column = 1


class Peak(Statistic):
    """Largest magnitude at each site; NaN or Inf where one was seen, so it is also the finite flag of the site.

    That of attn is v's too, and that of mlp is mlp_hidden's: a matrix product carries a NaN or Inf into its row
    whatever the weight (Inf times 0 is NaN), and so does the sum over probabilities. `resid_max` is the block's.
    """

    sites = ("q", "k", "attn", "mlp")
    every_step = sites
    over_micro_batches = "max"

    def measure(self, seen: Observation) -> Tensor:
        if seen.site in ("q", "k"):
            return seen.census.summary.q_peak if seen.site == "q" else seen.census.summary.k_peak
        return peak(seen.output)

    def finish(self, values: Tensor) -> Tensor:
        return values.flatten(1).amax(1)


class ResidualMax(Statistic):
    """Largest magnitude in each block's output, the residual stream; NaN or Inf where one was seen."""

    every_step = ("block",)
    over_micro_batches = "max"

    def measure(self, seen: Observation) -> Tensor:
        return seen.largest


class ResidualRMS(Statistic):
    """Root mean square of each block's output. Several micro-batches: the mean of theirs."""

    def measure(self, seen: Observation) -> Tensor:
        return seen.output.float().square().mean(-1)  # (B, T)

    def finish(self, values: Tensor) -> Tensor:
        return values.flatten(1).mean(1).sqrt()


class PreActivationStd(Statistic):
    """Standard deviation of the feed-forward's pre-activations, over at most `SAMPLED_ROWS` tokens (or one sequence).

    Several micro-batches: the mean of theirs.
    """

    sites = ("mlp_pre",)

    def measure(self, seen: Observation) -> Tensor:
        x = seen.output[: max(1, SAMPLED_ROWS // self.seq_len)].float()
        return torch.stack([x.mean(-1), x.square().mean(-1)])  # (2, B, T)

    def finish(self, values: Tensor) -> Tensor:
        mean, square = values.flatten(2).mean(2).unbind(1)
        return (square - mean.square()).clamp(min=0).sqrt()

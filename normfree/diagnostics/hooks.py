"""Hooks that record statistics from the step's own forward pass.

They are attached before the model is compiled, and each begins with one plain attribute, `level`: a compiled step has
a variant for each level it ever runs at, and the one for "off" runs nothing of them. Hooks that silently do not fire
are the classic trap of torch.compile, so every forward pass that records is counted on the device, and a record whose
count is wrong is an error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from normfree.diagnostics.census import Census, stack
from normfree.diagnostics.parameters import ParameterStatistic
from normfree.diagnostics.statistics import Observation, Statistic
from normfree.model import Transformer
from normfree.tables import STATISTICS


class Group(NamedTuple):
    """Statistics that share a buffer: measured at every step or for a record only, added up or the largest taken."""

    when: str
    kind: str


class Part(NamedTuple):
    """A piece of a buffer: all layers of a statistic at one site, or numbers that a level does not measure."""

    name: str | None
    site: str
    size: int


class Plan(NamedTuple):
    """What a level does, worked out beforehand: tracing a compiled step costs by what Python has to go through."""

    measured: dict[str, list[tuple[str, Statistic]]]  # site -> statistics
    parts: dict[Group, list[Part]]  # of the buffers that are written


INSIDE_ATTENTION = ("q", "k", "attn_probs")
INSIDE_MLP = ("mlp_pre", "mlp_hidden")
LEVELS = ("off", "residual", "all", "record")  # what runs inside a forward pass; each contains the one before


def is_forward(name: str) -> bool:
    """Whether a statistic is measured in the forward pass, by `Recorder`; else it is `ParameterRecorder`'s."""
    return not issubclass(STATISTICS[name], ParameterStatistic)


def _is_wanted(statistic: Statistic, site: str, level: str) -> bool:
    """Whether a level measures the statistic at this site, which is one of its own."""
    if level in ("off", "record"):
        return level == "record"
    return site in statistic.every_step and (level == "all" or site == "block")


def _append(parts: list[Part], part: Part) -> None:
    """Neighbours that are not measured are one constant."""
    if part.name is None and parts and parts[-1].name is None:
        part = Part(None, part.site, parts.pop().size + part.size)
    parts.append(part)


class Recorder:
    """Statistics of every layer, in preallocated device buffers.

        recorder = Recorder(model, ["attn_entropy", "nan_count"])
        recorder.start()
        model(idx, targets)
        values = recorder.unpack(recorder.stop().cpu())

    Buffers: (n_layer, *shape), or (sites, n_layer, *shape) for a statistic of several sites. `statistics` may also map
    names to classes that are in no table. `seq_len` is that of the batches; default: the model's block_size.
    `beside` are measured with them and reported nowhere: the graph of a compiled step depends on what is measured.
    One recorder a model at a time: it says what the layers hand out.
    """

    def __init__(
        self,
        model: Transformer,
        statistics: Sequence[str] | Mapping[str, type[Statistic]],
        seq_len: int | None = None,
        beside: Sequence[str] = (),
    ) -> None:
        self._level = "off"
        self._blocks: Any = list(model.blocks)
        self.n_layer = model.config.n_layer
        self.device = model.wte.weight.device
        classes = statistics if isinstance(statistics, Mapping) else {name: STATISTICS[name] for name in statistics}
        seq_len = seq_len or model.config.block_size
        measured = {name: STATISTICS[name] for name in STATISTICS if name in classes or name in beside} | dict(classes)
        self.statistics: dict[str, Statistic] = {name: cls(model.config, seq_len) for name, cls in measured.items()}
        self.names = [name for name in classes if not self.statistics[name].snapshot]
        self.snapshot_names = [name for name in classes if self.statistics[name].snapshot]
        self.watch_names = [name for name in classes if self.statistics[name].every_step]
        self._places, self._buffers = self._lay_out()
        self._plans = {level: self._plan_of(level) for level in LEVELS}
        self._plan = self._plans["off"]
        # micro-batches of this record, and forward passes that recorded
        self.passes = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._seen: dict[str, list[Tensor]] = {}  # of the forward pass under way, one value a layer
        self.failed: dict[str, str] = {}  # statistics that are left out from then on, and why
        self._handles = [handle for block in model.blocks for handle in self._attach(block)]
        self._handles.append(model.final_norm.register_forward_pre_hook(self._take))

    @property
    def level(self) -> str:
        return self._level

    @level.setter
    def level(self, level: str) -> None:
        assert level in LEVELS, level
        self._level = level
        self._plan = self._plans[level]
        for block in self._blocks:
            for part, sites in ((block.attn.inner_attention, INSIDE_ATTENTION), (block.mlp, INSIDE_MLP)):
                part.look = any(site in self._plan.measured for site in sites)
                part.seen = None  # of a forward pass that broke off

    # -- layout -------------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        statistic = self.statistics[name]
        sites = (len(statistic.sites),) if len(statistic.sites) > 1 else ()
        return (*sites, self.n_layer, *statistic.shape)

    def axes(self, name: str) -> tuple[str, ...]:
        statistic = self.statistics[name]
        return (("site",) if len(statistic.sites) > 1 else ()) + ("layer", *statistic.axes)

    def size(self, names: Sequence[str] | None = None) -> int:
        """Length of the flat tensor."""
        return 2 + sum(math.prod(self.shape(name)) for name in (self.statistics if names is None else names))

    def _lay_out(self) -> tuple[dict[str, tuple[Group, int]], dict[Group, Tensor]]:
        """A float64 buffer for each group of statistics, and where in them each has its place.

        Statistics measured together share a buffer, so that a forward pass writes a few times, not once for each.
        """
        places, sizes = {}, dict[Group, int]()
        for name, statistic in self.statistics.items():
            when = "watch" if statistic.every_step else "record"
            group = Group(when, "max" if statistic.over_micro_batches == "max" else "sum")
            places[name] = (group, sizes.get(group, 0))
            sizes[group] = sizes.get(group, 0) + math.prod(self.shape(name))
        buffers = {g: torch.zeros(size, dtype=torch.float64, device=self.device) for g, size in sizes.items()}
        return places, buffers

    def _plan_of(self, level: str) -> Plan:
        measured: dict[str, list[tuple[str, Statistic]]] = {}
        parts: dict[Group, list[Part]] = {
            group: [] for group in self._buffers if level != "off" and (group.when == "watch" or level == "record")
        }
        for name, statistic in self.statistics.items():
            size = self.n_layer * math.prod(statistic.shape)
            for site in statistic.sites:
                wanted = _is_wanted(statistic, site, level)
                if wanted:
                    measured.setdefault(site, []).append((name, statistic))
                if self._places[name][0] in parts:
                    _append(parts[self._places[name][0]], Part(name if wanted else None, site, size))
        return Plan(measured, parts)

    # -- in the forward pass ------------------------------------------------------------------------------------------

    def _attach(self, block: nn.Module) -> list[Any]:
        held: dict[str, Any] = {}  # until a sublayer's output is there, which says whether they are finite

        def on_output(site: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if self._level != "off":
                    self._measure(Observation(site, output))

            return hook

        def on_attn_proj(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._level != "off":
                seen = Observation("attn", output)
                self._measure(seen)
                self._measure(Observation("v", held.pop("v"), gate=seen))

        def on_mlp(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._level == "off":
                return
            seen = Observation("mlp", output)
            if module.look:
                assert module.seen is not None, "two recorders look into one model"
                (before, after), module.seen = module.seen, None
                self._measure(Observation("mlp_pre", before))
                self._measure(Observation("mlp_hidden", after, gate=seen))
            self._measure(seen)

        def on_attention(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if self._level != "off":
                assert not kwargs.get("q_offset", 0), "with a key-value cache there is nothing to record"
                held["v"] = args[2]
                if not module.look:
                    return
                if module.seen is not None:
                    census, module.seen = Census.of_rows(module.seen), None
                else:
                    rows = self._level == "record" and any(s.snapshot for s in self.statistics.values())
                    census = Census.take(args[0], args[1], module.scale, rows)
                for site, tensor in zip(INSIDE_ATTENTION, (args[0], args[1], output), strict=True):
                    self._measure(Observation(site, tensor, census))

        attn, mlp = block.attn, block.mlp
        assert isinstance(attn, nn.Module)
        assert isinstance(mlp, nn.Module)
        return [
            block.register_forward_hook(on_output("block")),
            attn.proj.register_forward_hook(on_attn_proj),  # type: ignore[union-attr]
            attn.inner_attention.register_forward_hook(on_attention, with_kwargs=True),  # type: ignore[union-attr]
            mlp.register_forward_hook(on_mlp),
        ]

    def _measure(self, seen: Observation) -> None:
        if seen.site not in self._plan.measured:
            return
        with torch.no_grad():
            for name, statistic in self._plan.measured[seen.site]:
                if name not in self.failed:
                    value = self._tried(name, statistic.measure, seen)
                    if value is not None:
                        self._seen.setdefault(f"{name}/{seen.site}", []).append(value)

    def _tried(self, name: str, work: Callable[[Any], Tensor], given: Any) -> Tensor | None:
        """A statistic that fails costs itself, not the run. What fails while a graph is compiled is an error."""
        if torch.compiler.is_compiling():
            return work(given)
        try:
            result = work(given)
            if not isinstance(result, Tensor):
                raise TypeError(f"it gave {type(result).__name__}, not a tensor")
            return result
        except Exception as error:  # whatever somebody's statistic raises
            self.failed[name] = f"{type(error).__name__}: {error}"
            return None

    def _take(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """After the last block: the layers' values together into the buffers."""
        if self._level == "off":
            return
        with torch.no_grad():
            for group, parts in self._plan.parts.items():
                buffer, nothing = self._buffers[group], float("-inf") if group.kind == "max" else 0.0
                values = torch.cat([self._part(part, nothing) for part in parts])
                if group.kind == "max":
                    buffer.copy_(torch.maximum(buffer, values))
                else:
                    buffer.add_(values)
            self.passes[1].add_(1)
        self._seen = {}

    def _part(self, part: Part, nothing: float) -> Tensor:
        """Flat, float64; where nothing is measured, what changes nothing."""
        values = None if part.name is None else self._of_all_layers(part.name, part.site)
        if values is None:
            return torch.full((part.size,), nothing, dtype=torch.float64, device=self.device)
        return values

    def _of_all_layers(self, name: str, site: str) -> Tensor | None:
        """None of a statistic that failed."""
        if name in self.failed:
            return None
        values = self._seen.get(f"{name}/{site}", [])
        if len(values) != self.n_layer:
            raise RuntimeError(f"{name} was measured at {site} in {len(values)} of {self.n_layer} layers")

        def finished(values: list[Tensor]) -> Tensor:
            result = self.statistics[name].finish(stack(values)).flatten().double()
            wanted = self.n_layer * math.prod(self.statistics[name].shape)
            if result.numel() != wanted:
                raise ValueError(f"it gave {result.numel()} numbers, not {wanted}")
            return result

        return self._tried(name, finished, values)

    # -- around it ----------------------------------------------------------------------------------------------------

    def start(self, micro_batches: int = 1, level: str = "record") -> None:
        """Clear the buffers and record the next `micro_batches` forward passes at `level`, one of `LEVELS`."""
        for group, buffer in self._buffers.items():
            if group.when == "record" and level != "record":
                continue
            buffer.fill_(float("-inf") if group.kind == "max" else 0)
        self.passes[0].fill_(micro_batches)
        self.passes[1].zero_()
        self._seen = {}
        self.level = level

    def flat(self, names: Sequence[str] | None = None) -> Tensor:
        """What is recorded of `names` (default: of every statistic), as one float64 tensor, still on the device."""
        parts = [self.passes]
        for name in self.statistics if names is None else names:
            group, start = self._places[name]
            parts.append(self._buffers[group][start : start + math.prod(self.shape(name))])
        return torch.cat(parts)

    def stop(self) -> Tensor:
        """Switch the hooks off; everything recorded as one flat tensor."""
        self.level = "off"
        return self.flat()

    def unpack(self, flat: Tensor, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of a flat tensor on the host, without those of statistics that failed.

        Raises when the hooks did not fire as often as they must.
        """
        values = flat.numpy()
        expected, passes = values[:2].astype(int).tolist()
        if passes != expected:
            raise RuntimeError(
                f"diagnostics hooks fired in {passes} forward passes, not {expected}: the record of this step would be "
                "wrong"
            )
        arrays, values = {}, values[2:]
        for name in self.statistics if names is None else names:
            size = math.prod(self.shape(name))
            part, values = values[:size], values[size:]
            if name in self.failed:
                continue
            statistic = self.statistics[name]
            if statistic.over_micro_batches == "mean":
                part = part / expected
            dtype = np.int64 if statistic.dtype == torch.int64 else np.float32
            arrays[name] = part.reshape(self.shape(name)).astype(dtype)
        return arrays

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.level = "off"
        for handle in self._handles:
            handle.remove()

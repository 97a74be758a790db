"""Hooks that record statistics from the step's own forward pass.

They are attached before the model is compiled, and each begins with one plain attribute, `enabled`: a compiled step has
two variants, and the one without statistics runs nothing of them. Hooks that silently do not fire are the classic trap
of torch.compile, so every write is counted on the device, and a record whose counts are wrong is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfree.diagnostics.statistics import Observation, Statistic
from normfree.model import Transformer
from normfree.runs import SITES
from normfree.tables import STATISTICS


class Recorder:
    """Statistics of every layer, in preallocated device buffers.

        recorder = Recorder(model, ["attn_entropy", "nan_count"])
        recorder.start(micro_batches=1)
        model(idx, targets)
        values = recorder.unpack(recorder.stop().cpu())

    Buffers: (n_layer, *shape), or (sites, n_layer, *shape) for a statistic of several sites.
    """

    def __init__(self, model: Transformer, names: Sequence[str]) -> None:
        self.enabled = False
        self.n_layer = model.config.n_layer
        device = model.wte.weight.device
        self.statistics: dict[str, Statistic] = {name: STATISTICS[name](model.config) for name in names}
        self.buffers = {name: self._allocate(s, device) for name, s in self.statistics.items()}
        self.writes = torch.zeros(len(SITES), self.n_layer, dtype=torch.int64, device=device)
        self.expected = torch.ones(1, dtype=torch.int64, device=device)  # micro-batches of this record
        self._handles = [handle for i, block in enumerate(model.blocks) for handle in self._attach(block, i)]

    def _allocate(self, statistic: Statistic, device: torch.device) -> Tensor:
        sites = (len(statistic.sites),) if len(statistic.sites) > 1 else ()
        return torch.zeros(*sites, self.n_layer, *statistic.shape, dtype=statistic.dtype, device=device)

    def axes(self, name: str) -> tuple[str, ...]:
        statistic = self.statistics[name]
        return (("site",) if len(statistic.sites) > 1 else ()) + ("layer", *statistic.axes)

    def _attach(self, block: nn.Module, layer: int) -> list[Any]:
        def on_output(site: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if self.enabled:
                    self._write(layer, Observation(site, output))

            return hook

        def on_attention(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, int], output: Tensor) -> None:
            if self.enabled:
                offset = kwargs.get("q_offset", 0)
                q, k = args[0].detach(), args[1].detach()
                self._write(layer, Observation("attn_probs", output, q, k, scale=module.scale, q_offset=offset))

        attn: Any = block.attn
        return [
            block.register_forward_hook(on_output("block")),
            attn.register_forward_hook(on_output("attn")),
            block.mlp.register_forward_hook(on_output("mlp")),  # type: ignore[union-attr]
            attn.inner_attention.register_forward_hook(on_attention, with_kwargs=True),
        ]

    def _write(self, layer: int, seen: Observation) -> None:
        with torch.no_grad():
            for name, statistic in self.statistics.items():
                if seen.site not in statistic.sites:
                    continue
                buffer = self.buffers[name]
                row = buffer[statistic.sites.index(seen.site), layer] if len(statistic.sites) > 1 else buffer[layer]
                value = statistic.measure(seen).to(statistic.dtype)
                if statistic.over_micro_batches == "max":
                    row.copy_(torch.maximum(row, value))
                else:
                    row.add_(value)
            self.writes[SITES.index(seen.site), layer].add_(1)

    def start(self, micro_batches: int = 1) -> None:
        """Clear the buffers and switch the hooks on for the next `micro_batches` forward passes."""
        for name, statistic in self.statistics.items():
            self.buffers[name].fill_(float("-inf") if statistic.over_micro_batches == "max" else 0)
        self.writes.zero_()
        self.expected.fill_(micro_batches)
        self.enabled = True

    def stop(self) -> Tensor:
        """Switch the hooks off; everything recorded as one flat float64 tensor, still on the device."""
        self.enabled = False
        return torch.cat([t.flatten().double() for t in (self.expected, self.writes, *self.buffers.values())])

    def unpack(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The arrays of a flat tensor on the host. Raises when a hook did not fire as often as it must."""
        values = flat.numpy()
        expected, values = int(values[0]), values[1:]
        writes, values = values[: self.writes.numel()], values[self.writes.numel() :]
        if not (writes == expected).all():
            raise RuntimeError(
                f"diagnostics hooks fired {writes.reshape(self.writes.shape).astype(int).tolist()} times "
                f"by site and layer, not {expected} each: the record of this step would be wrong"
            )
        arrays = {}
        for name, buffer in self.buffers.items():
            part, values = values[: buffer.numel()], values[buffer.numel() :]
            if self.statistics[name].over_micro_batches == "mean":
                part = part / expected
            dtype = np.int64 if buffer.dtype == torch.int64 else np.float32
            arrays[name] = part.reshape(buffer.shape).astype(dtype)
        return arrays

    def size(self) -> int:
        """Length of the flat tensor."""
        return 1 + self.writes.numel() + sum(buffer.numel() for buffer in self.buffers.values())

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

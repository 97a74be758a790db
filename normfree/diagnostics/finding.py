"""What a traced step found: the first value that is not finite, and where it came from. Imports no torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any


def value_name(value: float) -> str:
    """NaN, Inf or -Inf."""
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


@dataclass(frozen=True)
class Finding:
    """The first non-finite tensor of a step.

    `phase`: forward, backward or optimizer. `tensor`: "output" of the module; "intermediate", in its code between its
    modules; "loss"; "gradient", of an output, in the module's backward pass; `weight`, `weight.grad` or
    `weight.exp_avg` for a parameter of the module. `value` and `index` are those of the tensor's first bad element.
    """

    step: int
    micro_batch: int
    phase: str
    module: str
    tensor: str
    value: str
    nan_count: int
    inf_count: int
    elements: int
    index: tuple[int, ...]
    input_max: float | None  # largest finite magnitude that went in: of inputs, or of the gradient that arrived
    output_max: float  # largest finite magnitude of the tensor itself

    @property
    def site(self) -> str:
        """The path by which `debug.inject.module` would name the place."""
        if self.tensor in ("output", "intermediate", "gradient", "loss"):
            return self.module
        return f"{self.module}.{self.tensor.removesuffix('.grad')}"

    @property
    def place(self) -> tuple[str, str, str]:
        """(phase, module, tensor): what two findings must agree in to be the same place."""
        return self.phase, self.module, self.tensor

    @property
    def count(self) -> int:
        return self.nan_count + self.inf_count

    def _bad(self) -> str:
        """`12 Inf of 262,144`"""
        counts = [f"{n:,} {name}" for n, name in ((self.nan_count, "NaN"), (self.inf_count, "Inf")) if n]
        return f"{' and '.join(counts)} of {self.elements:,}"

    def words(self) -> str:
        """One sentence for people: what turned what into what."""
        given = "" if self.input_max is None else f" up to {self.input_max:.2g}"
        at = f"step {self.step}, {self.phase}"
        if self.phase != "optimizer":
            at += f", micro-batch {self.micro_batch}"
        if self.tensor == "loss":
            text = "the hidden states are finite, but the loss is not: it arose in the head's logits or in the loss"
        elif self.tensor == "output":
            turned = f"turned inputs{given} into" if given else "put out"
            text = f"{self.module} {turned} {self._bad()} outputs"
        elif self.tensor == "intermediate":
            text = f"the code of {self.module} between its modules turned finite values into {self._bad()} values"
        elif self.tensor == "gradient":
            text = f"the backward pass of {self.module} turned gradients{given} into {self._bad()} gradients"
        elif self.phase == "backward":
            text = f"the gradient of {self.site} holds {self._bad()} values, the others up to {self.output_max:.2g}"
        elif self.phase == "optimizer":
            text = f"the optimizer's moment {self.site} holds {self._bad()} values"
        else:
            text = f"the weight {self.site} holds {self._bad()} values"
        return f"{text} ({at})."

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the sentence as `text`."""
        return asdict(self) | {"index": list(self.index), "text": self.words()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Finding":
        """What `to_dict` gave."""
        values = {name: value for name, value in values.items() if name != "text"}
        return cls(**(values | {"index": tuple(values["index"])}))

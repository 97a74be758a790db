"""The swap points: every choice a configuration can name, and the class behind the name.

A table maps a name to `module:attribute`, resolved on first use. So a configuration is checked against the choices
without importing torch, and adding a choice is one line here (and one class there).
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from normfree.errors import UserError, unknown


class Table:
    """Names to classes or functions of `module`, or of another one that is named; imported when first asked for."""

    def __init__(self, kind: str, module: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {name: e if ":" in e else f"{module}:{e}" for name, e in entries.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            own = " One of your own comes with its file: --plugin FILE, or normfree.plugins.load_plugin(FILE)."
            raise UserError(unknown(self.kind, name, self._entries) + own)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that adds a choice from outside; a name is taken once."""

        def add(entry: Any) -> Any:
            if name in self._entries:
                raise UserError(f"{self.kind} {name!r} is there already; take another name.")
            self._entries[name] = entry
            return entry

        return add

    def remove(self, name: str) -> None:
        """Take a registered choice out again (tests, notebooks)."""
        del self._entries[name]


NORMS = Table(
    "norm",
    "normfree.model.norms",
    {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "none": "NoNorm"},
)

ACTIVATIONS = Table(
    "act",
    "normfree.model.activations",
    {
        "gelu": "GELU",
        "gelu_tanh": "GELUTanh",
        "relu": "ReLU",
        "leaky_relu": "LeakyReLU",
        "learnable_leaky_relu": "LearnableLeakyReLU",
        "silu": "SiLU",
        "relu2": "ReLUSquared",
        "identity": "Identity",
    },
)

LOSSES = Table("loss", "normfree.model.losses", {"cross_entropy": "CrossEntropy"})

SCHEDULES = Table(
    "schedule",
    "normfree.training.schedules",
    {"linear": "linear", "cosine": "cosine", "constant": "constant", "wsd": "warmup_stable_decay"},
)

SOURCES = Table(
    "data.source",
    "normfree.data.sources",
    {
        "python_stdlib": "PythonStdlib",
        "python_environment": "PythonEnvironment",
        "files": "Files",
        "codeparrot": "CodeParrot",
    },
)

# Any other value of data.tokenizer is the path of a tokenizer.json, or of the tokenizer/ of a run.
TOKENIZERS = Table(
    "data.tokenizer",
    "normfree.data.tokenizer",
    {"code8k": "load_code8k", "gpt2": "load_gpt2", "bytes": "load_bytes", "trained": "train_tokenizer"},
)

STATISTICS = Table(
    "statistic",
    "normfree.diagnostics.statistics",
    {
        "attn_entropy": "AttentionEntropy",
        "max_score": "MaxScore",
        "sink_mass": "SinkMass",
        "one_minus_max": "OneMinusMax",
        "nan_count": "NaNCount",
        "inf_count": "InfCount",
        "peak": "Peak",
        "resid_max": "ResidualMax",
        "resid_rms": "ResidualRMS",
        "mlp_pre_std": "PreActivationStd",
        "position_entropy": "PositionEntropy",
        "entropy_quantiles": "EntropyQuantiles",
        "effective_width": "EffectiveWidth",
        "grad_norm": "normfree.diagnostics.parameters:GradientNorm",
        "update_norm": "normfree.diagnostics.parameters:UpdateNorm",
        "grad_nan_count": "normfree.diagnostics.parameters:GradientNaNCount",
        "grad_inf_count": "normfree.diagnostics.parameters:GradientInfCount",
        "param_nan_count": "normfree.diagnostics.parameters:ParameterNaNCount",
        "param_inf_count": "normfree.diagnostics.parameters:ParameterInfCount",
    },
)

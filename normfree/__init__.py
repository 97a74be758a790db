"""normfree: train GPT-2- and Pythia-style language models with and without normalization, and look inside them.

    from normfree import load_run, load_runs, load_model

Everything is imported on first use: reading a run costs no torch import.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_run": "normfree.runs",
    "load_runs": "normfree.runs",
    "load_model": "normfree.training.checkpoint",
    "register_norm": "normfree.plugins",
    "register_activation": "normfree.plugins",
    "register_statistic": "normfree.plugins",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normfree' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

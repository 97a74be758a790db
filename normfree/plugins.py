"""What a plug-in file uses to add its own norm, activation or statistic, and how `run.py --plugin` loads it."""

import hashlib
import importlib.util
from pathlib import Path

from normfree.errors import UserError
from normfree.tables import ACTIVATIONS, NORMS, STATISTICS

register_norm = NORMS.register
register_activation = ACTIVATIONS.register
register_statistic = STATISTICS.register

loaded: dict[str, str] = {}  # path -> sha256, of this process


def load_plugin(path: str | Path) -> dict[str, str]:
    """Run a Python file that registers choices; returns its path and sha256, for the run's record.

    Only ever called with a path that the user typed: never with one from a YAML file or a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file.")
    spec = importlib.util.spec_from_file_location(f"normfree_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file.")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    loaded[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": str(path), "sha256": loaded[str(path)]}

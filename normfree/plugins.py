"""What a plug-in file uses to add its own norm, activation or statistic, and how `run.py --plugin` loads it."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from normfree.errors import UserError
from normfree.tables import ACTIVATIONS, NORMS, STATISTICS

register_norm = NORMS.register
register_activation = ACTIVATIONS.register
register_statistic = STATISTICS.register

loaded: dict[str, str] = {}  # path -> sha256, of this process


def load_plugin(path: str | Path) -> dict[str, str]:
    """Run a Python file that registers choices; returns its path and sha256, for the run's record.

    Only ever called with a path that the user typed: never with one from a YAML file or a checkpoint. Raises
    `UserError` with the file's own line where it cannot be run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file.")
    # Dynamo and dataclasses look a module up by its name; files of one name in two folders are two modules.
    name = f"normfree_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--plugin {path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    loaded[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": str(path), "sha256": loaded[str(path)]}


def load_plugins(paths: Iterable[str | Path]) -> list[dict[str, str]]:
    """Each file once, however often it is named."""
    return [load_plugin(path) for path in dict.fromkeys(Path(path).resolve() for path in paths)]


def _line(error: Exception, path: Path) -> str:
    """Where in the file it happened: `, line 3`; empty where that is elsewhere."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):  # in this file, or in one that it imports
        places.append((error.filename or "", error.lineno))
    lines = [line for name, line in places if Path(name).resolve() == path.resolve()]
    return f", line {lines[-1]}" if lines else ""

"""Draw and run the figure scripts in this process."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from normfree.runs import Run
from plotting import common


def draw(script: str, runs: Sequence[Run], width: float = 6.75, **options: Any) -> tuple[Figure, list[common.Row]]:
    """The figure and the rows of `plot`."""
    plot: Callable[..., list[common.Row]] = importlib.import_module(f"plotting.{script}").plot
    with matplotlib.rc_context(common.STYLE):
        fig = common.figure(width)
        rows = plot(runs, fig, **options)
    return fig, rows


def command(script: str, *arguments: object) -> int:
    code: int = importlib.import_module(f"plotting.{script}").main([str(a) for a in arguments])
    return code

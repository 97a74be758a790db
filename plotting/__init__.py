"""The figures of a run: one small script a figure, and `draw_all`, which draws what a run has recorded.

    python plotting/entropy_heatmap.py RUN [RUN ...] [--step N] [--out FILE] [--data FILE.csv]

Reads run directories only; never imports torch.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfree.runs import Run

# Script -> the arrays of which it needs at least one (none: it draws the scalars of every run).
SCRIPTS: dict[str, tuple[str, ...]] = {
    "entropy_heatmap": ("attn_entropy", "probe_attn_entropy"),
    "layerwise_entropy": ("attn_entropy", "probe_attn_entropy"),
    "entropy_ranges": ("attn_entropy", "probe_attn_entropy"),
    "nan_counts": ("nan_count", "probe_nan_count"),
    "learned_slopes": ("act_slope",),
    "loss_curves": (),
}


def draw_all(run: "Run", folder: Path, formats: Sequence[str] = ("png",)) -> dict[str, Path | Exception]:
    """Draw every figure for which `run` has records into `folder`: file name -> its path, or what went wrong.

    Never raises: a figure is no reason to lose a training run.
    """
    drawn: dict[str, Path | Exception] = {}
    for script, arrays in SCRIPTS.items():
        if arrays and not set(arrays) & set(run.array_names):
            continue
        for kind in formats:
            name = f"{script}.{kind}"
            try:
                drawn[name] = draw(run, script, Path(folder) / name)
            except Exception as error:
                drawn[name] = error
    return drawn


def draw(run: "Run", script: str, out: Path) -> Path:
    """One figure of one run with its default options."""
    import matplotlib

    from plotting import common

    with matplotlib.rc_context(common.STYLE):
        fig = common.figure()
        import_module(f"plotting.{script}").plot([run], fig)
        common.save(fig, out)
    return out

"""Other views of the record: TensorBoard and Weights & Biases. They are never the record, and never end a run."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from normfree.config import Config, flat_keys


def heatmap_image(entropy: np.ndarray, ceiling: float) -> np.ndarray:
    """(n_layer, n_head) entropies as an image (3, h, w) in [0, 1]: grey by share of the ceiling, red where NaN."""
    cell = np.ones((12, 12))
    level = np.kron(np.nan_to_num(entropy / ceiling), cell).clip(0, 1)
    bad = np.kron(np.isnan(entropy), cell)
    return np.stack([np.where(bad, 1.0, level), np.where(bad, 0.0, level), np.where(bad, 0.0, level)])


class TensorBoard:
    """Scalars, per-layer means and heat maps under tensorboard/, the settings as hparams of the same run."""

    def __init__(self, directory: Path, config: Config, ceiling: float, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the checkpoint belong to the part of an interrupted run that is done again.
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start)
        self.ceiling = ceiling
        self.settings = {name: v for name, v, _ in flat_keys(config) if isinstance(v, int | float | str)}

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def array(self, name: str, step: int, value: np.ndarray, axes: tuple[str, ...]) -> None:
        if name.endswith("attn_entropy"):
            self.writer.add_image(f"{name}/heatmap", heatmap_image(value, self.ceiling), step)
        if axes == ("layer", "head"):
            value, axes = value.mean(axis=1), ("layer",)
        if axes == ("layer",):
            for layer, number in enumerate(value):
                self.writer.add_scalar(f"{name}/layer_{layer}", number, step)

    def finish(self, results: dict[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would open a second run beside this one.
        for summary in hparams(self.settings, {f"final/{k}": v for k, v in results.items()}):
            self.writer._get_file_writer().add_summary(summary)
        self.writer.close()


class WeightsAndBiases:
    """The same numbers to Weights & Biases."""

    def __init__(self, directory: Path, config: Config, ceiling: float, start: int) -> None:
        import wandb

        self.run = wandb.init(
            project=config.log.wandb_project,
            name=directory.name,
            dir=str(directory),
            mode=config.log.wandb,
            config={name: v for name, v, _ in flat_keys(config)},
        )

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def array(self, name: str, step: int, value: np.ndarray, axes: tuple[str, ...]) -> None:
        if axes in (("layer",), ("layer", "head")):
            means = value.mean(axis=tuple(range(1, value.ndim))) if value.ndim > 1 else value
            self.run.log({f"{name}/layer_{i}": float(v) for i, v in enumerate(means)}, step=step)

    def finish(self, results: dict[str, float]) -> None:
        self.run.summary.update(results)
        self.run.finish()


class Views:
    """All views of a run. One that fails is left out from then on; `problems` says why, `news` what nobody said yet."""

    def __init__(self, directory: Path, config: Config, ceiling: float, start: int) -> None:
        self.problems: list[str] = []
        self.news: list[str] = []
        self.views: list[Any] = []
        wanted: list[Callable[..., Any]] = []
        if config.log.tensorboard:
            wanted.append(TensorBoard)
        if config.log.wandb != "off":
            wanted.append(WeightsAndBiases)
        for view in wanted:
            try:
                self.views.append(view(directory, config, ceiling, start))
            except Exception as error:  # whatever a view's library raises, the run goes on without it
                self._give_up(view.__name__, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self.problems.append(f"{name}: {type(error).__name__}: {error}")
        self.news.append(f"{name} is left out from here on: {type(error).__name__}: {error}")
        warnings.warn(f"{name} is left out from here on: {error}", stacklevel=3)

    def _each(self, method: str, *args: Any) -> None:
        for view in list(self.views):
            try:
                getattr(view, method)(*args)
            except Exception as error:
                self.views.remove(view)
                self._give_up(type(view).__name__, error)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        self._each("scalars", step, values)

    def array(self, name: str, step: int, value: np.ndarray, axes: tuple[str, ...]) -> None:
        self._each("array", name, step, value, axes)

    def finish(self, results: dict[str, float]) -> None:
        self._each("finish", results)

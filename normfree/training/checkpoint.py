"""What a checkpoint holds: weights, optimizer state and settings, as safetensors and JSON only.

    step-00000100/  model.safetensors  optimizer.safetensors  state.json  config.yaml  MANIFEST.json

Random state needs no saving: data order and dropout are derived from the seed and the step. How the files get to the
disk and are found again: store.py, whose functions are used by the names they have here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from normfree.config import Config, from_dict, to_dict
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.model import Transformer
from normfree.runs import is_checkpoint, is_run
from normfree.training.store import NotSaved, best_good, newest_good, note_best, prune, sweep, verify, write

__all__ = [
    "NotSaved",
    "best_good",
    "find_checkpoint",
    "load_config",
    "load_model",
    "load_training_state",
    "load_weights",
    "model_tensors",
    "newest_good",
    "note_best",
    "optimizer_tensors",
    "prune",
    "save_checkpoint",
    "sweep",
    "verify",
]


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every parameter once, by the name of its owner."""
    return {name: p.detach() for name, p in model.named_parameters()}


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as `<state>/<parameter name>`."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {f"{key}/{names[p]}": t for p, state in optimizer.state.items() for key, t in state.items()}


def save_checkpoint(
    run_dir: Path,
    step: int,
    config: Config,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Tensor],
) -> bool:
    """Write `checkpoints/step-<step>`; it exists whole or not at all. Returns whether all it holds is finite.

    Raises `NotSaved` where the disk is full or fails. Takes memory for a copy of its largest file.
    """
    tensors = {name: t.cpu().contiguous() for name, t in model_tensors(model).items()}
    moments = {name: t.detach().cpu().contiguous() for name, t in optimizer_tensors(model, optimizer).items()}
    finite = all(bool(t.isfinite().all()) for t in (*tensors.values(), *moments.values()))
    others = {f"extra/{name}": t.cpu() for name, t in extra.items()}

    def contents() -> Iterator[tuple[str, bytes]]:
        yield "model.safetensors", to_bytes(tensors)
        yield "optimizer.safetensors", to_bytes(moments | others)
        yield "state.json", json.dumps({"step": step, "finite": finite}).encode() + b"\n"
        yield "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode()

    write(run_dir, step, contents())
    return finite


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", EXIT_CHECKPOINT) from error


@torch.no_grad()
def load_weights(model: Transformer, checkpoint: Path) -> None:
    """Copy a verified checkpoint's weights into `model`; names and shapes must agree."""
    saved = _load_tensors(checkpoint / "model.safetensors")
    ours = model_tensors(model)
    faults = [f"{name} is missing" for name in ours if name not in saved]
    faults += [f"{name} is not in this model" for name in saved if name not in ours]
    faults += [
        f"{name} is {tuple(saved[name].shape)}, not {tuple(t.shape)}"
        for name, t in ours.items()
        if name in saved and saved[name].shape != t.shape
    ]
    if faults:
        raise UserError(f"{checkpoint} does not fit this model: {'; '.join(faults[:6])}.", EXIT_CHECKPOINT)
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])


@torch.no_grad()
def load_training_state(
    model: Transformer, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor], checkpoint: Path
) -> int:
    """Weights, moments and `extra` as they were; returns the step."""
    state = verify(checkpoint)
    load_weights(model, checkpoint)
    saved = _load_tensors(checkpoint / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        entries = {key.split("/")[0]: t for key, t in saved.items() if key.split("/", 1)[1] == name}
        entries.pop("extra", None)
        if entries:
            optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in entries.items()}
    missing = [name for name in extra if f"extra/{name}" not in saved]
    if missing:
        raise UserError(f"checkpoint {checkpoint} has no {', '.join(missing)}: of another version.", EXIT_CHECKPOINT)
    for name, tensor in extra.items():
        tensor.copy_(saved[f"extra/{name}"])
    return state["step"]


def find_checkpoint(path: str | Path, best: bool = False) -> Path:
    """The checkpoint that `path` names: itself, or of a run directory the newest good one, or the `best`. Verified."""
    path = Path(path)
    if is_checkpoint(path):
        verify(path)
        return path
    if is_run(path):
        good = best_good(path) if best else newest_good(path)
        if good is not None:
            return good[1]
        noted = " and was noted as its best" if best else ""
        raise UserError(f"run {path} has no checkpoint that is whole and finite{noted}.", EXIT_CHECKPOINT)
    raise UserError(f"{path} is neither a run directory nor a checkpoint.", EXIT_CHECKPOINT)


def load_config(checkpoint: Path) -> Config:
    return from_dict(yaml.safe_load((checkpoint / "config.yaml").read_text()))


def load_model(path: str | Path, device: str = "cpu", best: bool = False) -> Transformer:
    """The `Transformer` of a run (its newest good checkpoint, or its `best`) or of one checkpoint, in eval mode.

    `model(idx)` maps token ids (B, T) to logits (B, T, V). Every file is verified before it is used.
    """
    checkpoint = find_checkpoint(path, best)
    model = Transformer(load_config(checkpoint).model)
    load_weights(model, checkpoint)
    return model.to(device).eval()

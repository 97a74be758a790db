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
from normfree.rules import RANGES, value_faults
from normfree.runs import is_checkpoint, is_run
from normfree.training.store import NotSaved, best_good, identity, newest_good, note_best, prune, sweep, verify, write

__all__ = [
    "NotSaved",
    "best_good",
    "find_checkpoint",
    "load_config",
    "load_model",
    "load_training_state",
    "load_weights",
    "model_tensors",
    "identity",
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
    """Copy a verified checkpoint's weights into `model`; names, shapes and types must agree."""
    saved = _load_tensors(checkpoint / "model.safetensors")
    _require_fit(model, saved, checkpoint)
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])


def _require_fit(model: Transformer, saved: dict[str, Tensor], checkpoint: Path) -> None:
    ours = model_tensors(model)
    faults = [f"{name} is missing" for name in ours if name not in saved]
    faults += [f"{name[:60]} is not in this model" for name in saved if name not in ours]
    pairs = [(name, _kind(saved[name]), _kind(t)) for name, t in ours.items() if name in saved]
    faults += [f"{name} is {there}, not {here}" for name, there, here in pairs if there != here]
    if faults:
        raise UserError(f"{checkpoint} does not fit this model: {'; '.join(faults[:6])}.", EXIT_CHECKPOINT)


@torch.no_grad()
def load_training_state(
    model: Transformer, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor], checkpoint: Path
) -> int:
    """Weights, moments and `extra` as they were; returns the step."""
    state = verify(checkpoint)
    load_weights(model, checkpoint)
    saved = _load_tensors(checkpoint / "optimizer.safetensors")
    faults = list(_state_faults(model, extra, saved))
    if faults:
        raise UserError(
            f"checkpoint {checkpoint} is of another version or another model: {'; '.join(faults[:6])}.", EXIT_CHECKPOINT
        )
    parameters = dict(model.named_parameters())
    optimizer.state.clear()  # the checkpoint of step 0, to which a run may be taken back, has no moments
    for key, tensor in saved.items():
        kind, name = key.split("/", 1)
        if kind == "extra":
            if name in extra:
                extra[name].copy_(tensor)
        else:
            optimizer.state[parameters[name]][kind] = tensor.to(parameters[name].device)
    return state["step"]


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _state_faults(model: Transformer, extra: dict[str, Tensor], saved: dict[str, Tensor]) -> Iterator[str]:
    """What of an optimizer file is not this run's: names, shapes and types are looked at before any value is used."""
    parameters = dict(model.named_parameters())
    yield from (f"extra/{name} is missing" for name in extra if f"extra/{name}" not in saved)
    for key, tensor in saved.items():
        kind, _, name = key.partition("/")
        if kind == "extra" and name not in extra:
            continue  # kept by a run with other settings
        ours = extra.get(name) if kind == "extra" else parameters.get(name)
        if ours is None or kind not in ("extra", "step", "exp_avg", "exp_avg_sq"):
            yield f"{key[:60]} is unknown"
        elif _kind(tensor) != (_kind(ours) if kind != "step" else "() float32"):
            yield f"{key} is {_kind(tensor)}"


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
    """The settings of a verified checkpoint. Raises UserError where they are not such as this version writes."""
    path = checkpoint / "config.yaml"
    try:
        config = from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        faults = [fault for key, fault in value_faults(config) if key in RANGES]
        if faults:
            raise ValueError("; ".join(faults))
        return config
    except (OSError, ValueError, RecursionError, yaml.YAMLError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}", EXIT_CHECKPOINT) from error


def load_model(path: str | Path, device: str = "cpu", best: bool = False) -> Transformer:
    """The `Transformer` of a run (its newest good checkpoint, or its `best`) or of one checkpoint, in eval mode.

    `model(idx)` maps token ids (B, T) to logits (B, T, V). Every file is verified before it is used.
    """
    checkpoint = find_checkpoint(path, best)
    config = load_config(checkpoint).model
    saved = _load_tensors(checkpoint / "model.safetensors")
    # Settings that ask for more than the file holds are refused before anything of their size is made.
    if config.n_layer > len(saved):
        raise UserError(f"{checkpoint} does not fit this model: {config.n_layer} layers.", EXIT_CHECKPOINT)
    with torch.device("meta"):
        _require_fit(Transformer(config), saved, checkpoint)
    model = Transformer(config)
    load_weights(model, checkpoint)
    return model.to(device).eval()

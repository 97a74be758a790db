"""Checkpoints: safetensors and JSON only, written beside and renamed, every file's sha256 checked on load.

    step-00000100/  model.safetensors  optimizer.safetensors  state.json  config.yaml  MANIFEST.json

Random state needs no saving: data order and dropout are derived from the seed and the step.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from normfree.config import Config, from_dict, to_dict
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.model import Transformer
from normfree.runs import MANIFEST, checkpoint_name, is_checkpoint, is_run, load_run


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
    """Write `checkpoints/step-<step>`; it exists whole or not at all. Returns whether all it holds is finite."""
    target = run_dir / "checkpoints" / checkpoint_name(step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: t.cpu().contiguous() for name, t in model_tensors(model).items()}
    moments = {name: t.detach().cpu().contiguous() for name, t in optimizer_tensors(model, optimizer).items()}
    finite = all(bool(t.isfinite().all()) for t in (*tensors.values(), *moments.values()))
    save_file(tensors, temporary / "model.safetensors")
    moments |= {f"extra/{name}": t.cpu() for name, t in extra.items()}
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "finite": finite}) + "\n")
    (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"format": 1, "step": step, "sha256": files}, indent=2) + "\n")
    for path in temporary.iterdir():
        _fsync(path)
    _fsync(temporary)
    if target.exists():  # left by a run that was resumed from before it
        shutil.rmtree(target)
    temporary.rename(target)
    _fsync(target.parent)
    return finite


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json, after every file has been found to be what was written."""

    def damaged(what: str) -> UserError:
        return UserError(f"checkpoint {checkpoint} is damaged: {what}.", EXIT_CHECKPOINT)

    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise damaged(f"{MANIFEST} cannot be read ({error})") from error
    for name, digest in manifest["sha256"].items():
        path = checkpoint / name
        if not path.is_file():
            raise damaged(f"{name} is missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise damaged(f"{name} is not what was written")
    return json.loads((checkpoint / "state.json").read_text())


def newest_good(run_dir: Path, finite: bool = True) -> tuple[int, Path] | None:
    """(step, directory) of the newest checkpoint that verifies and, if `finite`, holds no NaN or Inf."""
    for step, path in reversed(load_run(run_dir).checkpoints):
        try:
            state = verify(path)
        except UserError:
            continue  # a damaged checkpoint is passed over here; naming it explicitly is an error
        if state["finite"] or not finite:
            return step, path
    return None


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, never the newest good one; and what killed writers left."""
    for leftover in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover)
    checkpoints = load_run(run_dir).checkpoints
    old = checkpoints[: max(0, len(checkpoints) - keep)]
    if not old:
        return
    good = newest_good(run_dir)
    for step, path in old:
        if (step, path) != good:
            shutil.rmtree(path)


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
    for name, tensor in extra.items():
        tensor.copy_(saved[f"extra/{name}"])
    return state["step"]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest good one of a run directory. Verified."""
    path = Path(path)
    if is_checkpoint(path):
        verify(path)
        return path
    if is_run(path):
        good = newest_good(path)
        if good is not None:
            return good[1]
        raise UserError(f"run {path} has no checkpoint that is whole and finite.", EXIT_CHECKPOINT)
    raise UserError(f"{path} is neither a run directory nor a checkpoint.", EXIT_CHECKPOINT)


def load_config(checkpoint: Path) -> Config:
    return from_dict(yaml.safe_load((checkpoint / "config.yaml").read_text()))


def load_model(path: str | Path, device: str = "cpu") -> Transformer:
    """The `Transformer` of a run (its newest good checkpoint) or of one checkpoint directory, in eval mode.

    `model(idx)` maps token ids (B, T) to logits (B, T, V). Every file is verified before it is used.
    """
    checkpoint = find_checkpoint(path)
    model = Transformer(load_config(checkpoint).model)
    load_weights(model, checkpoint)
    return model.to(device).eval()

"""Hugging Face `GPT2LMHeadModel` and `GPTNeoXForCausalLM` in and out.

    model = from_hf("folder/of/gpt2")           # config.json and safetensors; transformers need not be installed
    model = from_hf(AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m"))
    to_hf(model, "folder")                      # AutoModelForCausalLM.from_pretrained("folder") reads it

Logits agree in both directions; what the other side does not compute is refused, naming the setting.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.interop.hf_config import config_from_hf, config_to_hf
from normfree.interop.hf_weights import state_from_hf, state_to_hf
from normfree.model import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def from_hf(source: "str | Path | PreTrainedModel") -> Transformer:
    """The same model as a `Transformer`, in fp32, on the CPU, in eval mode.

    `source` is a transformers model, or a local folder with config.json and safetensors, in shards or not. `UserError`
    names every setting, missing or surplus tensor that stands in the way. The copy shares no memory with `source`.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        config = config_from_hf(_read_json(folder / "config.json"))
        tensors = read_weights(folder)
    else:
        config = config_from_hf(source.config.to_dict())
        tensors = source.state_dict()
    state = state_from_hf(tensors, config)
    model = Transformer(config)
    _check_shapes(state, model)
    model.load_state_dict(state)
    return model.eval()


def _check_shapes(state: dict[str, Tensor], model: Transformer) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} is {tuple(t.shape)}, not {expected[name]}" for name, t in state.items() if t.shape != expected[name]
    ]
    if wrong:
        raise UserError("the weights do not fit config.json: " + "; ".join(wrong[:5]) + ".", EXIT_CHECKPOINT)


def is_hf_folder(folder: str | Path) -> bool:
    """A folder that `from_hf` would try to read."""
    return (Path(folder) / "config.json").is_file()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} is no Hugging Face folder: it has no {path.name}.", EXIT_CHECKPOINT)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", EXIT_CHECKPOINT) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object.", EXIT_CHECKPOINT)
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        shards = [WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = _shards(folder / INDEX)
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f" {pickled[0]} is a pickle, which runs code when it is loaded, and is not read: convert it with "
            "transformers' save_pretrained(folder, safe_serialization=True)."
            if pickled
            else ""
        )
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}.{hint}", EXIT_CHECKPOINT)
    tensors: dict[str, Tensor] = {}
    for name in shards:
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is not in the folder.", EXIT_CHECKPOINT)
        tensors |= _read_shard(folder / name)
    return tensors


def _shards(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files.", EXIT_CHECKPOINT)
    return sorted(set(weight_map.values()))


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", EXIT_CHECKPOINT) from error


# ----------------------------------------------------------------------------------------------------------------------


def to_hf(model: Transformer, folder: str | Path | None = None) -> "PreTrainedModel":
    """The same model as a stock transformers model, in fp32, on the CPU, in eval mode; saved if a folder is given.

    Rows that pad the vocabulary are left out, absent biases are zeros. `UserError` names every key of the configuration
    that no stock class can express, before transformers is imported.
    """
    values = config_to_hf(model.config)
    transformers = _import_transformers()
    config = transformers.AutoConfig.for_model(**values)
    with torch.random.fork_rng(devices=[]):  # its constructor draws initial weights
        theirs = getattr(transformers, values["architectures"][0])(config)
    theirs.load_state_dict(state_to_hf(model))
    theirs.eval()
    if folder is not None:
        theirs.save_pretrained(folder, safe_serialization=True)
    return theirs


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("to_hf needs the package transformers: pip install transformers") from error
    return transformers

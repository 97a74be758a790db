"""A run directory with one checkpoint, made without training: random weights, a few texts, the tokenizer of bytes."""

from pathlib import Path

import torch

from normfree.config import Config, DataConfig, ModelConfig, resolve, resolve_vocabulary
from normfree.data.packing import prepare
from normfree.data.tokenizer import save_tokenizer
from normfree.model import Transformer, init_weights
from normfree.records import RunWriter
from normfree.training.checkpoint import save_checkpoint
from normfree.training.optimizer import build_optimizer

STEP = 30


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Text {i}. " + " ".join(str(i * j % 97) for j in range(60)))
    return folder


def make_run(folder: Path, **keys: object) -> Path:
    """`keys` go into the model's configuration."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32} | keys
    texts = write_texts(folder / "texts")
    data = DataConfig(source="files", path=str(texts), tokenizer="bytes", seq_len=24, cache_dir=str(folder / "cache"))
    config = resolve(Config(name="tiny", model=ModelConfig(**shape), data=data))  # type: ignore[arg-type]
    corpus = prepare(config.data, report=lambda line: None)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    config.data.fingerprint = corpus.fingerprint
    model = Transformer(config.model)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that is not uniform
    run_dir = folder / "run"
    writer = RunWriter(run_dir)
    writer.config(config)
    writer.status(status="finished", last_step=STEP)
    writer.close()
    save_tokenizer(corpus.tokenizer, run_dir / "tokenizer")
    save_checkpoint(run_dir, STEP, config, model, build_optimizer(model, config.optim), {})
    return run_dir

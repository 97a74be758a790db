"""Do the fast paths train as the plain ones do? python experiments/fast_paths.py [--out FILE.json] [--steps 300]

A GPU is needed. GPT-2 of 6 layers and width 512, T = 128, 64 sequences a step, bf16, on the Python standard library:
not compiled: the plain path with three seeds, then with the first seed each fast path alone and all together. What a
path does to the loss, averaged over windows of 50 steps, must be no more than what another seed does.
"""

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from normfree.config import Config, resolve, resolve_vocabulary
from normfree.data.packing import prepare
from normfree.model.attention import InnerAttention, QKVLinear
from normfree.model.feedforward import MLP
from normfree.model.linear import Linear
from normfree.model.losses import CrossEntropy
from normfree.training import machine
from normfree.training.loop import Trainer
from normfree.training.provenance import provenance, versions
from normfree.training.record import Due

# Each path, and the modules that take it.
PATHS = {"loss": (CrossEntropy,), "attention": (InnerAttention,), "products": (Linear, QKVLinear, MLP), "optimizer": ()}
WINDOW = 50
LR = {"none": 4e-4, "layernorm": 1e-3}  # without norms 1e-3 is lost within fifty steps, on either path


def curve(norm: str, act: str, seed: int, paths: tuple[str, ...], steps: int) -> np.ndarray:
    """The training loss of each step."""
    config = Config(seed=seed)
    config.model.norm, config.model.act = norm, act
    config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size = 6, 8, 512, 128
    config.train.batch_size, config.data.seq_len, config.train.max_steps = 64, 128, steps
    config.train.precision, config.train.compile, config.optim.lr = "bf16", False, LR[norm]
    config.train.fast = "optimizer" in paths
    config = resolve(config)
    corpus = prepare(config.data, report=lambda line: None)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    trainer = Trainer(config, corpus, Path("unused"), torch.device("cuda"))
    chosen = tuple(kind for path in paths for kind in PATHS[path])
    parts = [part for part in (*trainer.model.modules(), trainer.model.loss) if isinstance(part, chosen)]
    assert bool(parts) == bool(chosen)

    @contextmanager
    def only_these(on: bool):
        for part in parts:
            part.fast = True
        yield

    trainer.model.fast_paths = only_these  # type: ignore[method-assign]
    losses = []
    for step in range(steps):
        trainer.train_step(step, Due())
        losses += [float(values[2]) for _, values, _ in trainer.mailbox.settled()]
    losses += [float(values[2]) for _, values, _ in trainer.mailbox.settled(everything=True)]
    assert len(losses) == steps
    return np.array(losses)


def windows(losses: np.ndarray) -> np.ndarray:
    return losses[: len(losses) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(axis=1)


def study(norm: str, act: str, steps: int) -> dict:
    seeds = [windows(curve(norm, act, seed, (), steps)) for seed in (1, 2, 3)]
    spread = max(float(np.abs(a - b).max()) for i, a in enumerate(seeds) for b in seeds[:i])
    row = {"norm": norm, "act": act, "plain": [w.tolist() for w in seeds], "between_seeds": spread, "from_plain": {}}
    for name, paths in {**{path: (path,) for path in PATHS}, "all": tuple(PATHS)}.items():
        found = windows(curve(norm, act, 1, paths, steps))
        row["from_plain"][name] = float(np.abs(found - seeds[0]).max())
        row[name] = found.tolist()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    if options.steps < WINDOW:
        parser.error(f"--steps: at least {WINDOW}, the steps of a window")
    if not torch.cuda.is_available():
        parser.exit(64, "this trains on a GPU, and PyTorch sees no CUDA device here\n")
    rows: list[dict] = []
    for norm, act in (("none", "relu"), ("none", "gelu"), ("layernorm", "gelu_tanh")):
        with machine.process_flags(False):
            rows.append(study(norm, act, options.steps))
        print_row(rows[-1])
        if options.out:  # after each, so that a run that is stopped keeps what it has
            about = {"device": torch.cuda.get_device_name(), "versions": versions()}
            text = json.dumps(about | provenance() | {"window": WINDOW, "rows": rows}, indent=2)
            Path(options.out).write_text(text + "\n")
    if wrong := [row for row in rows if max(row["from_plain"].values()) > row["between_seeds"]]:
        raise SystemExit(
            f"a fast path does more than another seed: {', '.join(r['norm'] + ' ' + r['act'] for r in wrong)}"
        )


def print_row(row: dict) -> None:
    away = ", ".join(f"{name} {value:.4f}" for name, value in row["from_plain"].items())
    last = row["plain"][0][-1]
    print(f"{row['norm']} {row['act']}: last {WINDOW} steps, plain: {last:.4f}; largest difference of a window, ")
    print(f"   between seeds {row['between_seeds']:.4f}; from the plain path: {away}", flush=True)


if __name__ == "__main__":
    main()

"""What looking inside costs a training step: python experiments/diagnostics_cost.py [--out FILE.json] [--plain]

GPT-2 small (124 M parameters, vocabulary 50 304) without norms, ReLU, bf16, compiled, on a GPU: whole training steps of
the trainer itself, on text, all variants in one process and interleaved, medians over rounds. The variants:

    no hooks   the hooks taken off the model before it was compiled
    off        diagnostics.watch=off, the hooks in place
    residual   diagnostics.watch=residual: the flight recorder without entropy
    all        diagnostics.watch=all: entropy, maximum score, residual maximum and counts, a finite flag of every site
    tenth      diagnostics.watch=off and everything recorded at every tenth step

Without a GPU it is the default job (nano, 16 x 128, fp32, eager) on the CPU: read the ratios, on an idle machine.
`--plain` measures with train.fast=false; `--profile` prints the kernels that `all` adds.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfree.config import Config, resolve, resolve_vocabulary
from normfree.data.packing import prepare
from normfree.training import machine
from normfree.training.loop import Trainer
from normfree.training.provenance import provenance, versions
from normfree.training.record import Due

STEPS = 10  # of a variant at a time


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def configuration(batch: int, T: int, plain: bool = False) -> Config:
    config = Config()
    config.model.norm, config.model.act = "none", "relu"
    config.train.batch_size, config.data.seq_len, config.train.max_steps = batch, T, 10**6
    if DEVICE.type == "cpu":
        config.train.precision, config.optim.lr = "fp32", 1e-4
        return resolve(config)
    config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size = 12, 12, 768, 1024
    # GPT-2's numbers: in a vocabulary that is mostly unused the head's products would be of zeros, which take less.
    config.model.vocab_size, config.model.vocab_used = 50304, 50257
    config.optim.lr = 1e-4  # safe: a lost run would measure NaN
    config.train.precision, config.train.compile, config.train.fast = "bf16", True, not plain
    return resolve(config)


def build(batch: int, T: int, hooks: bool, plain: bool) -> Trainer:
    config = configuration(batch, T, plain)
    corpus = prepare(config.data)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    trainer = Trainer(config, corpus, Path("unused"), DEVICE)
    if not hooks:
        trainer.recorder.remove()
    return trainer


class Variant:
    """A way to run steps of a trainer: what is watched, and every how many steps everything is recorded."""

    def __init__(self, trainer: Trainer, watch: str, record_every: int = 0) -> None:
        self.trainer, self.watch, self.every = trainer, watch, record_every
        self.step = 0

    def run(self, steps: int) -> float:
        """Milliseconds a step."""
        trainer = self.trainer
        trainer.set_watch(self.watch)
        synchronize()
        began = time.perf_counter()
        for i in range(steps):
            trainer.train_step(self.step, Due(record=bool(self.every) and i % self.every == self.every // 2))
            trainer.mailbox.settled()
            self.step += 1
        synchronize()
        trainer.mailbox.settled(everything=True)
        if self.watch != "off":  # raises where the hooks did not fire
            trainer.recorder.unpack(trainer.recorder.flat().cpu())
        return 1000 * (time.perf_counter() - began) / steps


def measure(batch: int, T: int, rounds: int, plain: bool, profile: bool) -> dict[str, Any]:
    # Two models of one shape share compiled graphs, unless the graph's guards ask for hooks.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    hooked, bare = build(batch, T, hooks=True, plain=plain), build(batch, T, hooks=False, plain=plain)
    variants = {
        "no hooks": Variant(bare, "off"),
        "off": Variant(hooked, "off"),
        "residual": Variant(hooked, "residual"),
        "all": Variant(hooked, "all"),
        "tenth": Variant(hooked, "off", 10),
    }
    for name, variant in variants.items():
        began = time.perf_counter()
        variant.run(6)
        print(f"{batch} x {T} {name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(variant.run(STEPS))
    if profile:
        print_profile(variants)
    assert int(hooked.flag.bad_steps) == int(bare.flag.bad_steps) == 0, "the steps were not finite"
    medians = {name: float(np.median(values)) for name, values in times.items()}
    row: dict[str, Any] = {"batch": batch, "T": T, "ms": medians}
    # Round by round against the neighbour in time, so that a drift of the clock cancels.
    base = {name: "no hooks" if name == "off" else "off" for name in variants if name != "no hooks"}
    row["percent"] = {
        name: 100 * float(np.median(np.array(times[name]) / np.array(times[other]) - 1)) for name, other in base.items()
    }
    quarter = np.percentile(np.array(times["off"]) / medians["off"] - 1, [25, 75]) * 100
    row["spread_of_off_percent"] = [float(v) for v in quarter]
    return row


def print_profile(variants: dict[str, Variant]) -> None:
    found = {}
    for name in ("off", "all", "tenth"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            variants[name].run(10)
        found[name] = {e.key: (e.self_device_time_total / 10_000, e.count / 10) for e in profile.key_averages()}
        total = sum(t for t, _ in found[name].values())
        print(f"-- {name}: {total:.2f} ms in kernels, {sum(n for _, n in found[name].values()):.0f} of them")
    for name in ("all", "tenth"):
        new = {k: v for k, v in found[name].items() if k not in found["off"] or v[1] != found["off"][k][1]}
        gone = {k: v for k, v in found["off"].items() if k not in found[name]}
        added, less = (sum(t for t, _ in kernels.values()) for kernels in (new, gone))
        print(f"-- {name}, not in off: {added:.3f} ms; gone: {less:.3f} ms")
        for key, (t, n) in sorted(new.items(), key=lambda item: -item[1][0])[:22]:
            print(f"   {t:8.3f} ms {n:5.0f}  {key[:110]}")
        for key, (t, n) in sorted(gone.items(), key=lambda item: -item[1][0])[:8]:
            print(f"  -{t:8.3f} ms {n:5.0f}  {key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--shapes", nargs="+", default=["512x128", "64x1024"] if DEVICE.type == "cuda" else ["16x128"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    shapes = [shape.split("x") for shape in options.shapes]
    if wrong := [s for s in shapes if len(s) != 2 or not all(n.isdecimal() for n in s)]:
        parser.error(f"--shapes {'x'.join(wrong[0])}: sequences x tokens, as in 512x128")
    rows = []
    for batch, T in shapes:
        with machine.process_flags(False):
            rows.append(measure(int(batch), int(T), options.rounds, options.plain, options.profile))
    for row in rows:
        print(f"{row['batch']} x {row['T']}: " + ", ".join(f"{n} {v:.2f} ms" for n, v in row["ms"].items()))
        print("   " + ", ".join(f"{n} {v:+.2f} %" for n, v in row["percent"].items()))
    if options.out:
        about = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", "versions": versions()}
        settings = {"plain": options.plain, "rounds": options.rounds, "steps": STEPS}
        with open(options.out, "w") as file:
            json.dump(about | provenance() | settings | {"rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()

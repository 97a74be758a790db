"""How fast a training step is, beside its peers, and where its time goes: python experiments/speed.py [--out FILE.json]

On a GPU: bf16 autocast, fp32 weights and residual stream, forward + backward + clip + fused AdamW, vocabulary 50 304,
text. All models of a case live in one process and take turns, round by round (on the CPU a model and its peer do, pair
after pair); a ratio is the median over rounds of that round's two times. A turn of ours is `diagnostics.every` steps of
the trainer itself with what it does by default: entropy and counts at every step, at one of them a full record and its
probe. Reading a record on the host and writing it to disk are left out, and so are evaluation and checkpoints. The
models:

    ln, none              ours: LayerNorm + the family's GELU, and no norms in the blocks + ReLU
    ln-plain, none-plain  the same with train.fast=false
    peer-ln, peer-none    GPT2LMHeadModel of transformers (SDPA, torch.compile, its own loss) with its norms and GELU,
                          and with the blocks' norms replaced by identity and ReLU: the same architectures. Each at the
                          fastest number of --parts that a batch is cut into
    original              transformers, eager attention, output_attentions=True, LayerNorm + GELU, not compiled, 128
                          sequences a forward pass

Cases: 512x128 and 64x1024 (GPT-2 124M, all models); pythia-128 (Pythia-70M, 512 x 128), pythia-256 (256 x 256) and 355m
(128 x 128), ours alone; without a GPU cpu, the default job (nano, 16 x 128, fp32) against transformers with its own
Trainer, on an idle machine.

MFU, model FLOPs utilisation: (6 N + 12 L C T) tokens/s / rate, N = 12 L C^2 + V C, attention counted in full, not
causal; the rate is that of an 8192^3 bf16 matrix product in the same process, 20 of them a round. That is over before
the card meets its power limit, under which a step runs: beside it stands the rate over 800, as long as a turn. GiB:
what a model keeps (weights, moments) and the most that its turn adds, without the other models of the process.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from speed_peers import Peer, train_with_trainer
from speed_report import LABELS, classes_table, flops_per_token, kept, limits_table, models_table, summarize
from speed_turns import (
    CASES,
    DEVICE,
    PEER_STEPS,
    Ours,
    Theirs,
    configuration,
    entrant,
    matrix_rate,
    milliseconds,
    profile,
    synchronize,
)

from normfree.data.packing import Corpus, prepare
from normfree.training import machine
from normfree.training.provenance import provenance, versions

Late = Callable[[], bool]


def say(text: str) -> None:
    print(text, flush=True)


# -- a case ------------------------------------------------------------------------------------------------------------


def best_parts(peer: Peer, parts: list[int], late: Late) -> dict[str, float | str]:
    """Set the peer to the fastest of batch / parts sequences a forward pass; milliseconds of each that was tried."""
    tried: dict[str, float | str] = {}
    for n in parts:
        if tried and late():
            say(f"   no time to try {n} parts")
            break
        peer.micro = peer.config.train.batch_size // n
        try:
            peer.run(3)  # compiles
            tried[str(peer.micro)] = milliseconds(Theirs(peer, PEER_STEPS))
        except torch.OutOfMemoryError:
            tried[str(peer.micro)] = "out of memory"
        peer.optimizer.zero_grad(set_to_none=True)  # half done, where memory ran out
    times = {micro: ms for micro, ms in tried.items() if isinstance(ms, float)}
    if not times:
        raise SystemExit(f"the peer ran out of memory with --parts {' '.join(map(str, parts))}: add larger ones")
    peer.micro = int(min(times, key=times.__getitem__))
    return tried


def build(case: str, name: str, corpus: Corpus, parts: list[int], late: Late) -> tuple[Ours | Theirs, dict[str, Any]]:
    """A model of a case, compiled, and what is known of it before the rounds."""
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    model = entrant(case, name, corpus, DEVICE)
    about: dict[str, Any] = {}
    if isinstance(model, Theirs) and name != "original":
        about["tried_ms"] = best_parts(model.peer, parts, late)
    model.run()
    synchronize()
    about |= {"micro_batch": model.micro, "ready_s": time.perf_counter() - began}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.run()
    about["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    say(f"{case}: {LABELS[name]}: {about}")
    return model, about | {"turns_ms": []}


def measure(
    case: str, names: list[str], rounds: int, parts: list[int], late: Late, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One case on the GPU. `late` ends it after the round that is under way, the first one at the soonest.

    `keep` is given the case after each round, for a machine that may be taken away.
    """
    # Two models of one shape share compiled graphs, unless the graph's guards ask for hooks.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = 64  # all models of a case are variants of two functions
    corpus = prepare(configuration(case, "ln").data)
    entrants: dict[str, Ours | Theirs] = {}
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        entrants[name], models[name] = build(case, name, corpus, parts, late)
    row: dict[str, Any] = {"case": case, "batch": CASES[case][0], "T": CASES[case][1], "models": models}
    row |= {"flops_per_token": flops_per_token(configuration(case, "ln").model, row["T"]), "kernels": {}}
    row |= {"rates": [], "sustained_rates": []}
    for r in range(rounds):
        if r and late():
            break
        row["rates"].append(matrix_rate())
        row["sustained_rates"].append(matrix_rate(repeats=800))
        for name in names if r % 2 == 0 else reversed(names):
            models[name]["turns_ms"].append(milliseconds(entrants[name]))
        shown = ", ".join(f"{name} {models[name]['turns_ms'][-1]:.2f}" for name in names)
        say(f"{case}: round {r + 1}: {shown} ms; matrix product {row['rates'][-1] / 1e12:.0f} TFLOP/s")
        keep(row)
    for name in ("ln", "none"):
        if isinstance(model := entrants.get(name), Ours):
            row["kernels"][name] = profile(model)
            row["data_ms"] = model.data_ms()
    return row


def measure_cpu(names: list[str], rounds: int, late: Late) -> dict[str, Any]:
    """The default job, ours in the pauses of transformers' Trainer. The first block of each warms up."""
    cpu = torch.device("cpu")
    row: dict[str, Any] = {"case": "cpu", "batch": CASES["cpu"][0], "T": CASES["cpu"][1], "models": {}, "operators": {}}
    row["threads"] = torch.get_num_threads()
    for name in [name for name in names if not name.startswith("peer-")]:
        ours = entrant("cpu", name, prepare(configuration("cpu", name).data), cpu)
        assert isinstance(ours, Ours)
        config = ours.trainer.config
        times: dict[str, list[float]] = {name: [], f"peer-{name}": []}

        def turn(ms: float, name: str = name, ours: Ours = ours, times: dict[str, list[float]] = times) -> bool:
            with machine.process_flags(machine.choose_deterministic(ours.trainer.config, cpu)):
                own = milliseconds(ours)
            times[name].append(own)
            times[f"peer-{name}"].append(ms)
            say(f"cpu: {LABELS[name]}: ours {own:.1f} ms, transformers {ms:.1f} ms")
            return len(times[name]) > 1 and late()

        train_with_trainer(config, ours.trainer.batches, ours.steps, rounds + 1, turn)
        for key, values in times.items():
            row["models"][key] = {"turns_ms": values[1:], "micro_batch": config.train.batch_size}
        with machine.process_flags(machine.choose_deterministic(config, cpu)):
            row["operators"][name] = profile(ours)
        row["data_ms"] = ours.data_ms()
    return row


# -- the command -------------------------------------------------------------------------------------------------------


def save(out: str | None, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if not out:
        return
    about = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"}
    libraries = versions() | {"transformers": transformers.__version__}
    settings = {"rounds": options.rounds, "parts": options.parts}
    with open(out, "w") as file:
        cases = [kept(row) for row in rows]
        json.dump(about | {"versions": libraries} | provenance() | settings | {"cases": cases}, file, indent=1)


def selected(case: str, only: list[str] | None) -> list[str]:
    """The models of a case that are measured; on the CPU pairs, which take turns."""
    names = [name for name in CASES[case][3] if only is None or name in only]
    return names if case != "cpu" else [name for name in names if pair(name) in names]


def pair(name: str) -> str:
    return name.removeprefix("peer-") if name.startswith("peer-") else f"peer-{name}"


def arguments() -> argparse.Namespace:
    default = [case for case in CASES if (case == "cpu") == (DEVICE.type == "cpu")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.json", help="written after each round; on the CPU after the case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default)
    parser.add_argument("--only", nargs="+", choices=LABELS, metavar="MODEL", help="these models; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2], help="what compiled peers try; default: 1 2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.out and not Path(options.out).parent.is_dir():
        parser.error(f"--out {options.out}: there is no such folder")
    sizes = [CASES[case][0] for case in options.cases]
    if bad := [n for n in options.parts if n < 1 or any(size % n for size in sizes)]:
        parser.error(f"--parts {bad[0]}: a batch must fall into that many equal parts")
    if empty := [case for case in options.cases if not selected(case, options.only)]:
        parser.error(f"--only leaves nothing to measure of {empty[0]}; on the CPU it must name a model and its peer")
    if wrong := [case for case in options.cases if case not in default]:
        parser.error(f"--cases {wrong[0]}: with a GPU there is all but cpu, without one (CUDA_VISIBLE_DEVICES='') cpu")
    return options


def show(row: dict[str, Any]) -> None:
    """One case, before the table of all."""
    for name, times in (row.get("kernels") or row.get("operators") or {}).items():
        say(f"\n{row['case']}: {LABELS[name]}: where a step's time goes")
        for key, ms in list(times.items())[:20]:
            say(f"{ms:9.3f} ms  {key[:100]}")
    say("\n" + "\n".join([*models_table(row), *classes_table(row)]) + "\n")


def main() -> None:
    options, began = arguments(), time.perf_counter()
    rows: list[dict[str, Any]] = []

    def late() -> bool:
        return time.perf_counter() - began > 60 * options.minutes

    def keep(row: dict[str, Any]) -> None:
        summarize(row)
        save(options.out, options, [*rows, row])

    for case in options.cases:
        if late():
            say(f"{case}: left out, --minutes {options.minutes:g} are over")
            continue
        names = selected(case, options.only)
        if case == "cpu":
            row = measure_cpu(names, options.rounds, late)
        else:
            with machine.process_flags(False):
                row = measure(case, names, options.rounds, options.parts, late, keep)
        gc.collect()  # the models of this case
        torch.cuda.empty_cache()
        summarize(row)
        rows.append(row)
        save(options.out, options, rows)
        show(row)
    say("\n" + "\n".join(limits_table(rows)))


if __name__ == "__main__":
    main()

"""ReLU's Revival, reproduced: trains the cells of the study, and writes its page from what has been trained.

    python experiments/relu_revival.py --scale smoke                       four little models on a CPU, a check
    python experiments/relu_revival.py --scale short --corpus DIR          the study, cells in order of value
    python experiments/relu_revival.py --scale full                        the published recipe on CodeParrot
    python experiments/relu_revival.py --scale short --dry-run             which cells, which settings, how long
    python experiments/relu_revival.py --report                            docs/relu-revival.md, from the results

`--cells A B/gelu*` names rungs or cells (rung/arm/rate/seed). A cell whose result is in results/relu_revival is never
trained again; an interrupted or failed one is, by the same command. DIR is what revival_corpus.py --out DIR makes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from revival import place as place_of
from revival import records as store
from revival.cells import SEEDS, config_of
from revival.plan import Plan, plan
from revival.rungs import LADDER
from revival.study import Results

from normfree.errors import EXIT_OK, UserError


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scale", choices=LADDER, default="smoke", help="default: smoke")
    p.add_argument("--corpus", type=Path, metavar="DIR", help="the text of scale short; of full, a local copy")
    p.add_argument("--cells", nargs="+", default=[], metavar="CELL", help="rungs or cells, * allowed (default: all)")
    p.add_argument("--seeds", type=int, metavar="N", help="seeds of a reported number (default: 5; smoke: 1)")
    p.add_argument(
        "--budget-minutes", type=float, metavar="M", help="begin no cell that would end later; counted from the start"
    )
    p.add_argument(
        "--gpus",
        default="auto",
        metavar="LIST",
        help="a worker each: auto (all), none (the CPU), 0,1; 0,0,0: three share it",
    )
    p.add_argument("--together", type=int, metavar="N", help="cells a process trains in turn (default: 1; smoke: all)")
    p.add_argument("--out", type=Path, default=store.RESULTS, metavar="DIR", help="where results are kept")
    p.add_argument("--known", type=Path, nargs="+", default=[], metavar="DIR", help="more results, which count as done")
    p.add_argument("--merge", type=Path, metavar="DIR", help="add the results in DIR to those in --out; trains nothing")
    p.add_argument("--commit", metavar="SHA", help="of this code, for the results, where there is no git to ask")
    p.add_argument("--runs", type=Path, metavar="DIR", help="keep run directories here (default: they are removed)")
    p.add_argument("--dry-run", action="store_true", help="train nothing; list, check and count")
    p.add_argument("--report", action="store_true", help="write the page; trains nothing")
    p.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def wanted_seeds(a: argparse.Namespace) -> tuple[int, ...]:
    n = a.seeds if a.seeds is not None else (1 if a.scale == "smoke" else len(SEEDS))
    if n < 1:
        raise UserError(f"--seeds {n} must be at least 1.")
    return tuple(range(1, n + 1))


def train(a: argparse.Namespace, began: float) -> int:
    """Train what can be trained; `began`: the command, by the monotonic clock, from which the budget counts."""
    from revival import run as running

    wanted = plan(a.scale, Results([], None, wanted_seeds(a)), a.cells).cells if a.scale == "full" else ()
    place = place_of.find(a.scale, a.corpus, wanted)
    gpus = running.visible_gpus() if a.gpus == "auto" else tuple(g for g in a.gpus.split(",") if g and g != "none")
    with tempfile.TemporaryDirectory(prefix="relu_revival-") as temporary:
        runs = a.runs or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        options = running.Options(
            *(a.scale, place, a.out, runs.resolve(), a.runs is not None, wanted_seeds(a), tuple(a.cells)),
            commit=a.commit,
            known=tuple(a.known),
            seconds=float("inf") if a.budget_minutes is None else 60 * a.budget_minutes,
            gpus=gpus,
            together=a.together or (100 if a.scale == "smoke" else 1),
            began=began,
        )
        return running.run(options)


def dry_run(a: argparse.Namespace) -> int:
    """Every cell that can be trained now, its settings checked, and what is expected to follow."""
    fingerprint = place_of.known_fingerprint(a.scale)
    if fingerprint is None:
        print(f"The text of scale {a.scale} is known once it is prepared: until then no cell counts as done.")
    records = [record for folder in (*a.known, a.out) for record in store.read(folder, a.scale)]
    found = plan(a.scale, Results(records, fingerprint, wanted_seeds(a)), a.cells)
    for cell in found.cells:
        config_of(cell)
        print(f"{cell.name:44} {cell.settings}  {cell.recipe.tokens:>13,} tokens  {cell.recipe.seconds / 60:6.1f} min")
    print_totals(found)
    return EXIT_OK


def print_totals(found: Plan) -> None:
    print(
        f"{len(found.done)} cells are done; {len(found.cells)} can be trained now: {found.seconds / 3600:.1f} GPU-hours"
    )
    for step in found.waiting:
        print(f"later, at most {step.cells} cells of rung {step.rung}, {step.seconds / 3600:.1f} GPU-hours: {step.why}")
    for name, cells in found.impossible.items():
        print(f"not possible, this version has no setting {name}: {', '.join(cells)}")


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    a = arguments(argv)
    try:
        if a.merge:
            print("\n".join(f"{path}: {n} added" for path, n in store.merge(a.merge, a.out).items()))
            return EXIT_OK
        if a.report:
            from revival import report

            print(report.write(a.out, a.docs))
            return EXIT_OK
        return dry_run(a) if a.dry_run else train(a, began)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

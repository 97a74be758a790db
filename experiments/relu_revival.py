"""ReLU's Revival, reproduced: trains the cells of the study, and writes its page from what has been trained.

    python experiments/relu_revival.py --scale smoke                       four little models on a CPU, a check
    python experiments/relu_revival.py --scale short --corpus DIR          the study, cells in order of value
    python experiments/relu_revival.py --scale full                        the published recipe on CodeParrot
    python experiments/relu_revival.py --scale short --dry-run             which cells, which settings, how long
    python experiments/relu_revival.py --report                            docs/relu-revival.md, from the results

`--cells A B/relu E/global*` names rungs, arms or cells (rung/arm/rate/seed). Results are kept in results/relu_revival,
those of scale smoke in runs/.relu_revival. A cell whose result is there is never trained again; an interrupted or
failed one is, by the same command. DIR is what revival_corpus.py --out DIR makes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from revival import options
from revival import place as place_of
from revival import records as store
from revival.cells import config_of
from revival.plan import Plan, check_patterns, plan
from revival.rungs import LADDER
from revival.study import Results

from normfree.errors import EXIT_OK, UserError, say


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scale", choices=LADDER, default="smoke", help="default: smoke")
    p.add_argument("--corpus", type=Path, metavar="DIR", help="the text of scale short; of full, a local copy")
    p.add_argument(
        "--cells", nargs="+", default=[], metavar="CELL", help="rungs, arms or cells, * allowed (default: all)"
    )
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
    p.add_argument("--out", type=Path, metavar="DIR", help="where results are kept (default: see above)")
    p.add_argument("--known", type=Path, nargs="+", default=[], metavar="DIR", help="more results, which count as done")
    p.add_argument("--merge", type=Path, metavar="DIR", help="add the results in DIR to those in --out; trains nothing")
    p.add_argument("--commit", metavar="SHA", help="of this code, for the results, where git cannot tell")
    p.add_argument("--runs", type=Path, metavar="DIR", help="keep run directories here (default: they are removed)")
    p.add_argument("--dry-run", action="store_true", help="train nothing; list, check and count")
    p.add_argument("--report", action="store_true", help="write the page of --out; after --merge, where both are named")
    p.add_argument("--docs", type=Path, metavar="DIR", help="of the page (default: docs; with --out OUT, OUT/docs)")
    return p


def train(a: argparse.Namespace, began: float) -> int:
    """Train what can be trained; `began`: the command, by the monotonic clock, from which the budget counts."""
    from revival import run as running

    fresh = Results([], None, options.seeds(a))
    check_patterns(a.scale, fresh, a.cells)  # again once the text is known: before that, any rate may follow
    gpus = options.gpus(a.gpus, a.scale)
    out = options.writable(options.out(a), "--out")
    with tempfile.TemporaryDirectory(prefix="relu_revival-") as temporary:
        runs = options.writable(a.runs or Path(temporary), "--runs")
        place = place_of.find(a.scale, a.corpus, plan(a.scale, fresh, a.cells).cells if a.scale == "full" else ())
        return running.run(
            running.Options(
                *(a.scale, place, out, runs.resolve(), a.runs is not None, options.seeds(a), tuple(a.cells)),
                commit=a.commit,
                known=tuple(a.known),
                seconds=float("inf") if a.budget_minutes is None else 60 * a.budget_minutes,
                gpus=gpus,
                together=a.together or (100 if a.scale == "smoke" else 1),
                began=began,
            )
        )


def dry_run(a: argparse.Namespace) -> int:
    """Every cell that can be trained now, its settings checked, and what is expected to follow."""
    fingerprint = place_of.known_fingerprint(a.scale)
    lines = []
    if fingerprint is None:
        lines.append(f"The text of scale {a.scale} is known once it is prepared: until then no cell counts as done.")
    records = [record for folder in (*a.known, options.out(a)) for record in store.read(folder, a.scale)]
    results = Results(records, fingerprint, options.seeds(a))
    check_patterns(a.scale, results, a.cells)
    found = plan(a.scale, results, a.cells)
    for cell in found.cells:
        config_of(cell)
        length = f"{cell.recipe.tokens:>13,} tokens  {cell.recipe.seconds / 60:6.1f} min"
        lines.append(f"{cell.name:44} {cell.settings}  {length}")
    say("\n".join([*lines, *totals(found)]))
    return EXIT_OK


def totals(found: Plan) -> list[str]:
    hours = f"{found.seconds / 3600:.1f} GPU-hours"
    lines = [f"{len(found.done)} cells are done; {len(found.cells)} can be trained now: {hours}"]
    lines += [f"later, at most {text}" for text in found.later]
    for name, cells in found.impossible.items():
        lines.append(f"not possible, this version has no setting {name}: {', '.join(cell.name for cell in cells)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    p = parser()
    a = p.parse_args(argv)
    try:
        # By identity: what was typed is an object of its own, also where it says the default.
        options.check(a, {name for name, value in vars(a).items() if value is not p.get_default(name)})
        if a.merge:
            out = options.writable(options.out(a), "--out")
            print("\n".join(f"{path}: {n} added" for path, n in store.merge(a.merge, out).items()))
        if a.report:
            from revival import report

            print(report.write(options.out(a), options.docs(a)))
        if a.merge or a.report:
            return EXIT_OK
        return dry_run(a) if a.dry_run else train(a, began)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

"""One self-contained HTML page about one or many runs: losses, entropy of every head, faults, settings.

python -m normfree.report runs/normfree-nano-none-relu-58f5f614-s1
python -m normfree.report runs experiments/results/entropic_overload --out report.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from normfree.errors import EXIT_OK, UserError, say
from normfree.report.page import TITLE, build, check_out, write
from normfree.runs import Run, expand


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m normfree.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, a glob, or a folder of runs")
    p.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    p.add_argument("--title", default=TITLE, metavar="TEXT", help=f"heading of the page (default: {TITLE})")
    return p


def once(runs: Sequence[Run]) -> list[Run]:
    """The runs in the order given, each directory once: globs and folders may overlap."""
    return list({run.directory.resolve(): run for run in reversed(runs)}.values())[::-1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. A user's mistake is one message and its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        check_out(arguments.out)
        runs = once(expand(arguments.runs))
        size = write(build(runs, arguments.title), arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    say(f"wrote {arguments.out} ({size / 1e6:.1f} MB, {len(runs)} run{'s' if len(runs) > 1 else ''})")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

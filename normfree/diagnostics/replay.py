"""A step that met a value that is not finite, run again from its postmortem: as trained, eagerly, and in float64.

    python -m normfree.diagnostics.replay RUN/postmortem/step-00000123 [--device cpu|cuda] [--plugin FILE.py]
    python -m normfree.diagnostics.replay RUN                      # its newest postmortem

Says which module met it first, in which phase, and whether it is an overflow of the run's precision, a divergence that
float64 meets too, a planted fault (debug.inject), a spike, or not reproduced. Needs no corpus. Every verdict ends with
code 0.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from normfree.errors import EXIT_DIRECTORY, EXIT_OK, UserError
from normfree.plugins import load_plugins


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m normfree.diagnostics.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("directory", metavar="DIR", type=Path, help="a postmortem directory, or a run that has one")
    p.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: where the run did, if here)")
    p.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help="choices of your own, as in run.py")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the verdict and the passes as JSON, too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. A user's mistake is one message and its exit code."""
    from rich.console import Console

    from normfree.training import replaying  # training imports this package
    from normfree.training.postmortem import load_postmortem

    a = _parser().parse_args(argv)
    try:
        if a.json is not None and not a.json.absolute().parent.is_dir():
            raise UserError(f"--json {a.json}: there is no such folder.", EXIT_DIRECTORY)
        plugins = load_plugins(a.plugin)
        pm = load_postmortem(a.directory)
        replaying.check_plugins(pm, plugins)
        result = replaying.replay(pm, replaying.choose_device(pm, a.device))
        replaying.show(result, Console(markup=False, highlight=False))
        if a.json is not None:
            try:
                a.json.write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--json {a.json} cannot be written: {error.strerror}.", EXIT_DIRECTORY) from None
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

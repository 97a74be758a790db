"""The page itself: one HTML file with its style, scripts and numbers inside, which asks no network for anything.

Whatever comes from a run is text. Jinja escapes it in the tables; the data block is JSON in which `<`, `>` and `&` are
escapes, and the scripts only ever set it as text. A content security policy names the style and the script by their
hashes, so that nothing else can run, even if a name got through.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from normfree.errors import EXIT_DIRECTORY, UserError
from normfree.heads import OVERLOADED, RANGE_NAMES
from normfree.records import write_atomically
from normfree.report.data import run_data, seq_len
from normfree.report.packing import MAX_POINTS, MAX_RECORDS
from normfree.report.tables import overview, settings
from normfree.runs import Run, labels

TITLE = "normfree report"
SUFFIXES = (".html", ".htm")
# The last one starts the page.
SCRIPTS = ("core", "lines", "heads", "timeline", "losses", "entropy", "layers", "ranges", "snapshots", "faults", "page")
# Okabe and Ito's colours as in plotting/common.py; the style sheet has their brighter versions for a dark page.
N_COLOURS = 7
DASHES = ("", "7 3", "2 3", "8 3 2 3")  # of the first seven runs, the second seven, ...
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def build(runs: Sequence[Run], title: str = TITLE) -> str:
    """The page about these runs, at least one."""
    if not runs:
        raise UserError("a report needs at least one run.")
    for run in runs:
        _check(run)
    names = labels(runs)
    style, script = _asset("style.css"), "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    differing, equal = settings(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        title=title,
        runs=[overview(run, label) for run, label in zip(runs, names, strict=True)],
        differing=differing,
        equal=equal,
        style=_trusted(style),
        script=_trusted(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_trusted(_json(_data(runs, names))),
        n_colours=N_COLOURS,
        dashes=DASHES,
        max_points=MAX_POINTS,
        max_records=MAX_RECORDS,
    )


def write(page: str, out: Path) -> int:
    """Write the page, whole or not at all; returns its size in bytes."""
    check_out(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", EXIT_DIRECTORY) from error
    return len(page.encode("utf-8"))


def check_out(out: Path) -> None:
    """Refuse, before anything is read, what would not be a page or would take the place of something else."""
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; name a file in it: {out / 'report.html'}.", EXIT_DIRECTORY)
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: the ending must be one of: {', '.join(SUFFIXES)}.")


def _check(run: Run) -> None:
    """Open what every part of the page needs, so that a damaged file is named once, with its run."""
    try:
        T = seq_len(run)
        if T < 1 or not isinstance(run.status, dict):
            raise ValueError(f"a sequence length of {T}" if T < 1 else "run.json holds no object")
    except UserError as error:
        raise UserError(f"{run.directory}: {error}", error.exit_code) from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{run.directory} cannot be read: {error}", EXIT_DIRECTORY) from error


def _data(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    return {
        "runs": [run_data(run, label) for run, label in zip(runs, names, strict=True)],
        "overloaded": OVERLOADED,
        "ranges": list(RANGE_NAMES),
        "colours": N_COLOURS,
        "dashes": list(DASHES),
    }


def _json(data: dict[str, Any]) -> str:
    """Strict JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _asset(name: str) -> str:
    return (files("normfree.report") / "assets" / name).read_text(encoding="utf-8")


def _trusted(text: str) -> Markup:
    """Our own files and the escaped data block go into the page as they are."""
    return Markup(text)


def _hash(text: str) -> str:
    """A source of the content security policy: what the browser computes of the element's text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"

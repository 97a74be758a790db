"""Where a figure and its numbers may be written, looked at before anything is drawn."""

import os
from pathlib import Path

from normfree.errors import EXIT_DIRECTORY, UserError

FORMATS = ("png", "svg", "pdf")


def check_files(out: Path, data: Path | None) -> None:
    """Refuse endings that are not ours and places that cannot be written; nothing is made."""
    check_format(out)
    if data and data.suffix.lower() != ".csv":
        raise UserError(f"--data {data}: the ending must be .csv.")
    for path in (out, data) if data else (out,):
        try:
            why = _obstacle(path)
        except OSError as error:  # a folder on the way that may not be looked into
            why = str(error)
        if why:
            raise UserError(f"cannot write {path}: {why}.", EXIT_DIRECTORY)


def check_format(out: Path) -> None:
    if out.suffix.lstrip(".").lower() not in FORMATS:
        raise UserError(f"--out {out}: the ending must be one of: {', '.join('.' + f for f in FORMATS)}.")


def _obstacle(path: Path) -> str:
    """Why this file cannot be written, as far as can be seen without writing it; empty where nothing is in the way."""
    if path.is_dir():
        return "it is a directory"
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if there != path and not there.is_dir():
        return f"{there} is no directory"
    return "" if os.access(there, os.W_OK) else f"no permission to write {there}"

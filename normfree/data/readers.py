"""The text in a file of a user: which files `data.path` means, and the documents in each kind.

Nothing is guessed and nothing is skipped: what cannot be read is an error that names the file and the place in it.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from normfree.errors import EXIT_DATA, UserError

PLAIN = (".txt", ".py")  # a file is a document
LINES = (".jsonl", ".json.gz")  # a line is an object
KINDS = (*PLAIN, *LINES, ".parquet")


def _error(message: str) -> UserError:
    return UserError(f"data.path: {message}", EXIT_DATA)


def home(text: str, key: str) -> Path:
    """A path as typed, `~` filled in. Raises UserError, naming the key, for somebody who has no home here."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={text}: {error}", EXIT_DATA) from None


def kind_of(path: Path) -> str | None:
    """The ending that says how to read `path`; None for one that is not known."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def find_files(pattern: str) -> tuple[list[Path], Path]:
    """The files that a file, folder or glob means, sorted, and the folder they are in. Raises UserError for none."""
    path = home(pattern, "data.path")
    if path.is_file():
        if kind_of(path) is None:
            raise _error(f"{path} is of no known kind ({', '.join(KINDS)}).")
        return [path], path.parent
    if path.is_dir():
        found, root = list(path.rglob("*")), path
    elif glob.has_magic(pattern):
        found = [Path(name) for name in glob.iglob(str(path), recursive=True)]
        literal = [part for part in path.parts if glob.has_magic(part)][0]
        root = Path(*path.parts[: path.parts.index(literal)])
    else:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=1)
        raise _error(f"there is no {path}." + (f" Did you mean {path.parent / close[0]}?" if close else ""))
    files = sorted(file for file in found if file.is_file() and kind_of(file))
    if not files:
        raise _error(f"no file matches {pattern} and ends in {', '.join(KINDS)}.")
    return files, root


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise _error(
            f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}. Convert it, for example with "
            "iconv -t utf-8."
        ) from None


def _column(columns: Iterable[str], wanted: str, where: str) -> None:
    """Raise UserError unless `wanted` is among the columns."""
    columns = list(columns)
    if wanted not in columns:
        close = get_close_matches(wanted, columns, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"data.text_column={wanted!r} is no column of {where}.{hint} It has: {', '.join(columns)}.", EXIT_DATA
        )


def row_text(row: dict[str, Any], column: str, where: str) -> str:
    """The text of a row. Raises UserError if the column is missing or holds no text."""
    _column(row, column, where)
    if not isinstance(row[column], str):
        raise UserError(f"data.text_column={column!r} of {where} is no text, but {row[column]!r:.60}.", EXIT_DATA)
    return row[column]


def _json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, place) of each line that is not blank."""
    offset = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text, offset = _decode(line, path, offset), offset + len(line)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise _error(f"{path} line {number} is not JSON ({error}). One object a line is needed.") from None
                if not isinstance(row, dict):
                    raise _error(f"{path} line {number} is no JSON object. One object a line is needed.")
                yield row, f"{path} line {number}"
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _error(f"{path} is not a whole gzip file ({error}).") from None


def _parquet_texts(path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _column(file.schema_arrow.names, column, str(path))
            number = 0
            for batch in file.iter_batches(columns=[column], batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield row_text(row, column, f"{path} row {number}"), f"{path} row {number}"
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _error(f"{path} is not a readable parquet file ({error}).") from None


def read_texts(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """(text, place) of each document in a file, exactly as written. Raises UserError for a file without any.

    An empty .py file is a document without text: packages are marked by such files.
    """
    try:
        yield from _read(path, column)
    except OSError as error:
        raise _error(f"{path} cannot be read ({error}).") from None


def _read(path: Path, column: str) -> Iterator[tuple[str, str]]:
    kind = kind_of(path)
    if path.stat().st_size == 0 and kind != ".py":
        raise _error(f"{path} is empty.")
    if kind in PLAIN:
        yield _decode(path.read_bytes(), path), str(path)
        return
    rows = 0
    texts = (
        _parquet_texts(path, column)
        if kind == ".parquet"
        else ((row_text(row, column, place), place) for row, place in _json_rows(path))
    )
    for rows, (text, place) in enumerate(texts, start=1):  # noqa: B007
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell what Unicode forbids
            raise _error(f"{place}: the text has half a surrogate pair at character {error.start}.") from None
        yield text, place
    if not rows:
        raise _error(f"{path} has no rows.")


def check_file(path: Path, column: str) -> None:
    """Raise UserError for what the size and the first document of a file show."""
    next(iter(read_texts(path, column)))

"""One file that holds a tokenised corpus and its text, for machines without a network.

The file has the tokens only, which pack more tightly than the text does: the tokenizer is lossless, so the text is read
off them, and what the tokens cost on two cores (minutes) is not spent again. It is a tar in one xz stream, documents in
order of package and path, so that similar ones are neighbours:

    corpus.json   the manifest of the tokenised corpus, and the path of every document by package
    tokens.bin    uint16 ids of all documents, each closed by end-of-text
    <split>.rows  uint32, which documents make up the split, in its order
    tokenizer/    what `load_tokenizer` needs
"""

import hashlib
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus import text as texts
from normfree.config import DataConfig
from normfree.data import bpe, packing
from normfree.data.packing import Corpus
from normfree.data.sources import Files
from normfree.data.tokenizer import JSON_FILE
from normfree.errors import EXIT_DATA, UserError

MOST = 52 * 2**20  # bytes: a file of this size still travels
# Ids are two bytes each (lp, pb). The window reaches over everything, and unpacking needs as much memory.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**28, "lc": 3, "lp": 1, "pb": 1}]
ABOUT, TOKENS, ROWS, TOKENIZER = "corpus.json", "tokens.bin", ".rows", "tokenizer"


def _pieces(ids: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """The documents in `ids`, each with the end-of-text that closes it."""
    return np.split(ids, np.flatnonzero(ids == end_of_text)[:-1] + 1)


class _Bytes:
    """Ids to the bytes that they stand for: the bytes of all tokens in one array, and where each token's begin."""

    def __init__(self, tokenizer_json: bytes, end_of_text: int) -> None:
        characters = bpe.byte_characters()
        vocabulary = json.loads(tokenizer_json)["model"]["vocab"]
        spelled = [b""] * (end_of_text + 1)
        for token, token_id in vocabulary.items():
            spelled[token_id] = bytes(characters[character] for character in token)
        spelled[end_of_text] = b""
        self._all = np.frombuffer(b"".join(spelled), dtype=np.uint8)
        self._lengths = np.array([len(token) for token in spelled])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def __call__(self, ids: np.ndarray) -> bytes:
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        # Of a token that begins at byte b of the text, byte i of the text is byte start + (i - b) of the array.
        shift = np.repeat(self._starts[ids] - (ends - lengths), lengths)
        return self._all[shift + np.arange(len(shift))].tobytes()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _rows(corpus: Corpus, places: dict[bytes, int]) -> Iterator[tuple[str, np.ndarray, list[np.ndarray]]]:
    """(split, row of each document, its ids); `places` is the row of a text by the text's digest."""
    tokenizer = corpus.tokenizer
    spell = _Bytes(tokenizer.files()[JSON_FILE], tokenizer.end_of_text)
    assert set(corpus.splits) == set(corpus.manifest["splits"]), "a split is shorter than a training sequence"
    for split in corpus.splits:
        documents = _pieces(np.asarray(corpus.tokens(split)), tokenizer.end_of_text)
        rows = [places[_digest(spell(ids))] for ids in documents]
        yield split, np.array(rows, dtype="<u4"), documents


def pack(corpus: Corpus, folder: Path, file: Path) -> None:
    """Write `corpus`, made of the text in `folder`, to `file`. Raises UserError if it is too large to travel."""
    text = texts.read_texts(folder)
    contents = [row.text.encode() for rows in text.values() for row in rows]
    places = {_digest(content): row for row, content in enumerate(contents)}
    members: dict[str, bytes] = {}
    documents: list[np.ndarray | None] = [None] * len(contents)
    for split, rows, pieces in _rows(corpus, places):
        members[split + ROWS] = rows.tobytes()
        for row, ids in zip(rows, pieces, strict=True):
            documents[row] = ids
    assert all(ids is not None for ids in documents), "the text has documents that are in no split"
    paths = {name: [row.path for row in rows] for name, rows in text.items()}
    about = {"manifest": corpus.manifest | {"path": None}, "paths": paths}
    members = {ABOUT: json.dumps(about).encode(), **members}
    for path in sorted((corpus.directory / TOKENIZER).iterdir()):
        members[f"{TOKENIZER}/{path.name}"] = path.read_bytes()
    members[TOKENS] = np.concatenate(documents).astype("<u2").tobytes()  # type: ignore[arg-type]
    with lzma.open(file, "wb", filters=FILTERS) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if file.stat().st_size > MOST:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, more than {MOST:,}: list less text.", EXIT_DATA)


# ----------------------------------------------------------------------------------------------------------------------


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _members(file: Path, expected: dict[str, Any]) -> dict[str, bytes]:
    """Everything in `file`, once its sha256 is what was written down: nothing of another file is even read."""
    try:
        found = sha256(file)
        if found != expected["sha256"]:
            raise UserError(
                f"{file} is not the packed corpus that corpus.json describes: it has {file.stat().st_size:,} bytes and "
                f"sha256 {found}, not {expected['bytes']:,} and {expected['sha256']}. Copy it again, or make it anew "
                "with --pack.",
                EXIT_DATA,
            )
        with lzma.open(file) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    except OSError as error:
        raise UserError(f"the packed corpus cannot be read ({error}).", EXIT_DATA) from None


def unpack(file: Path, folder: Path, data: DataConfig, expected: dict[str, Any]) -> None:
    """Write the text of `file` to `folder`, and its tokens to where `prepare(data)` finds them.

    `expected` has the sha256 and bytes of the file. Raises UserError for any other file, before writing.
    """
    members = _members(file, expected)
    about = json.loads(members[ABOUT])
    end = about["manifest"]["tokenizer"]["end_of_text"]
    documents = _pieces(np.frombuffer(members[TOKENS], dtype="<u2"), end)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _write_text(members, about["paths"], documents, end, temporary)
    temporary.rename(folder)
    _write_tokens(members, about["manifest"] | {"path": data.path}, documents, data)


def _write_text(
    members: dict[str, bytes], paths: dict[str, list[str]], documents: list[np.ndarray], end: int, folder: Path
) -> None:
    spell = _Bytes(members[f"{TOKENIZER}/{JSON_FILE}"], end)
    remaining = iter(documents)
    for name, of_package in paths.items():
        rows = (texts.Row(path, spell(next(remaining)).decode()) for path in of_package)
        texts.write_rows(folder, name, rows)


def _write_tokens(
    members: dict[str, bytes], manifest: dict[str, Any], documents: list[np.ndarray], data: DataConfig
) -> None:
    """A corpus of the cache, as `prepare` would have written it; `prepare` checks it against its manifest."""
    place = packing.cache_folder(data, Files(data))
    with packing.alone(place, print) as temporary:
        if place.is_dir():
            return
        (temporary / TOKENIZER).mkdir(parents=True)
        for split in manifest["splits"]:
            rows = np.frombuffer(members[split + ROWS], dtype="<u4")
            np.concatenate([documents[row] for row in rows]).tofile(temporary / f"{split}.bin")
        for name, content in members.items():
            if name.startswith(f"{TOKENIZER}/"):
                (temporary / name).write_bytes(content)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        temporary.rename(place)

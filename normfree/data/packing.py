"""Text to tokens on disk, once: `prepare` returns the tokenised corpus, from the cache if it is there.

A corpus is a folder: one memory map of token ids a split (`train.bin`, ...), `manifest.json`, which says what they are,
and `tokenizer/`. It is written under another name and renamed when complete, under a lock, so that jobs that start
together tokenise once and a killed one leaves nothing that looks whole.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from normfree.config import DEFAULT_SEQ_LEN, DataConfig
from normfree.data.sources import Document, Source
from normfree.data.split import Split, split_documents
from normfree.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, save_tokenizer, tokenizer_identity
from normfree.errors import EXIT_DATA, UserError
from normfree.tables import SOURCES

FORMAT = 1  # of the cache; a new one makes every corpus anew
BATCH = 128  # documents encoded together
Report = Callable[[str], None]


@dataclass
class Corpus:
    """A tokenised corpus on disk."""

    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    splits: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 of the token files and the tokenizer."""
        return self.manifest["fingerprint"]

    @property
    def chunk_len(self) -> int | None:
        """T where documents were cut into chunks of T tokens (data.chunks=original), else None."""
        return self.manifest["chunk_len"]

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.splits:
            raise UserError(f"the corpus has no split {split!r}; it has {', '.join(self.splits)}.", EXIT_DATA)
        return self.manifest["splits"][split]

    def tokens(self, split: str) -> np.memmap:
        """The ids of a split (uint16 or uint32), 1-d, read-only. Splits: "train", "val" and perhaps "val_package"."""
        self._split(split)
        return np.memmap(self.directory / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of the documents over tokens, end-of-text included: turns a loss into bits per byte."""
        counts = self._split(split)
        return counts["bytes"] / counts["tokens"]


def _cache_dir(data: DataConfig) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "normfree"


def _chunk_len(data: DataConfig) -> int | None:
    return (data.seq_len or DEFAULT_SEQ_LEN) if data.chunks == "original" else None


def _folder(data: DataConfig, source: Source) -> Path:
    """The corpus's place in the cache: everything that decides the tokens, hashed, without reading the text."""
    key = [FORMAT, source.name, source.identity(), data.max_documents, tokenizer_identity(data), _chunk_len(data)]
    return _cache_dir(data) / "corpora" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def check(data: DataConfig) -> None:
    """Raise UserError for what is wrong with source and tokenizer and can be seen quickly. Writes nothing."""
    source = SOURCES[data.source](data)
    if not _folder(data, source).is_dir():
        source.check()


def prepare(data: DataConfig, report: Report = print) -> Corpus:
    """The corpus that `data` describes; tokenised now unless the cache has it. Raises UserError before writing."""
    source = SOURCES[data.source](data)
    folder = _folder(data, source)
    if not folder.is_dir():
        source.check()
        with _alone(folder, report) as temporary:
            if not folder.is_dir():
                _write(data, source, temporary, report)
                temporary.rename(folder)
    return _open(folder, data)


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[Path]:
    """Hold the lock of a corpus and give the name to write it under. Work that fails leaves nothing behind."""
    made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    temporary = folder.with_suffix(".tmp")
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            report("Another process is preparing this corpus; waiting for it.")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder.parent} cannot be written ({error}). Name another.", EXIT_DATA
        ) from None
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------------------------


def _texts(documents: Iterable[Document]) -> Iterator[str]:
    return (document.text for document in documents)


def _write(data: DataConfig, source: Source, folder: Path, report: Report) -> None:
    """Read, divide, tokenise; the folder is made once nothing can be wrong with the text any more."""
    report(f"Reading {source.name} ...")
    split = split_documents(source.documents("train"), data.max_documents)
    if not split.documents:
        raise UserError(f"data.source={data.source} has no text.", EXIT_DATA)
    tokenizer = build_tokenizer(data, lambda: _texts(split.documents["train"]))
    folder.mkdir()
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    counts = {}
    for name, documents in split.documents.items():
        counts[name] = _write_split(folder / f"{name}.bin", documents, tokenizer, dtype, _chunk_len(data))
        report(f"Tokenised {name}: {counts[name]['tokens']:,} tokens of {counts[name]['documents']:,} documents.")
    save_tokenizer(tokenizer, folder / "tokenizer")
    manifest = _manifest(data, source, tokenizer, split, counts, dtype)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer, chunk_len: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids, bytes of text they stand for) of each document, with end-of-text, or cut to whole chunks without it."""
    remaining = iter(documents)
    end = np.array([tokenizer.end_of_text])
    while batch := list(islice(remaining, BATCH)):
        texts = [document.text for document in batch]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            size = len(text.encode())
            if chunk_len is None:
                yield np.concatenate([ids, end]), size
            else:
                kept = len(ids) // chunk_len * chunk_len  # the tail is dropped, and its share of the bytes
                yield ids[:kept], round(size * kept / max(len(ids), 1))


def _write_split(
    path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype, chunk_len: int | None
) -> dict[str, Any]:
    counts: dict[str, Any] = {"documents": 0, "bytes": 0, "tokens": 0}
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for ids, size in _encode(documents, tokenizer, chunk_len):
            assert ids.max(initial=0) < tokenizer.n_vocab
            content = ids.astype(dtype).tobytes()
            file.write(content)
            digest.update(content)
            counts["documents"] += 1
            counts["bytes"] += size
            counts["tokens"] += len(ids)
    return counts | {"sha256": digest.hexdigest()}


def _manifest(
    data: DataConfig, source: Source, tokenizer: Tokenizer, split: Split, counts: dict[str, Any], dtype: np.dtype
) -> dict[str, Any]:
    """What the token files are. The same input gives the same manifest, versions aside."""
    for name, share in split.overlap.items():
        counts[name]["window_overlap"] = share
    whole = json.dumps([tokenizer.fingerprint, dtype.name, {name: counts[name]["sha256"] for name in sorted(counts)}])
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest(),
        "source": source.name,
        "path": data.path,
        "licence": source.licence,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "n_vocab": tokenizer.n_vocab,
            "end_of_text": tokenizer.end_of_text,
            "lossless": tokenizer.lossless,
        },
        "dtype": dtype.name,
        "chunk_len": _chunk_len(data),
        "splits": counts,
        "held_out_packages": split.packages,
        "near_duplicates_removed": {"documents": split.near_duplicates, "bytes": split.near_duplicate_bytes},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("tiktoken", "tokenizers")}},
    }


# ----------------------------------------------------------------------------------------------------------------------


def _open(folder: Path, data: DataConfig) -> Corpus:
    """A corpus of the cache, its files checked against the manifest and against what the settings ask of it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        itemsize = np.dtype(manifest["dtype"]).itemsize
        for name, counts in manifest["splits"].items():
            size, expected = (folder / f"{name}.bin").stat().st_size, counts["tokens"] * itemsize
            if size != expected:
                raise ValueError(f"{name}.bin has {size} bytes, not {expected}")
        tokenizer = load_tokenizer(folder / "tokenizer")
    except (OSError, ValueError, KeyError, UserError) as error:
        raise UserError(
            f"the cached corpus is damaged ({error}). Delete {folder} and start again.", EXIT_DATA
        ) from None
    if data.fingerprint is not None and data.fingerprint != manifest["fingerprint"]:
        raise UserError(
            f"data.fingerprint={data.fingerprint}, but the corpus is {manifest['fingerprint']}: its text or its "
            "tokenizer is not the one that was asked for. Set data.fingerprint=null to accept it.",
            EXIT_DATA,
        )
    return Corpus(folder, manifest, tokenizer, tuple(manifest["splits"]))

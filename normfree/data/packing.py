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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from normfree.config import DEFAULT_SEQ_LEN, DataConfig
from normfree.data.readers import home
from normfree.data.shards import check_ids, check_manifest
from normfree.data.sources import Document, Source
from normfree.data.split import Split, split_documents
from normfree.data.tokenizer import (
    Tokenizer,
    build_tokenizer,
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
)
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
        return home(data.cache_dir, "data.cache_dir").resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "normfree"


def _chunk_len(data: DataConfig) -> int | None:
    return (data.seq_len or DEFAULT_SEQ_LEN) if data.chunks == "original" else None


def cache_folder(data: DataConfig, source: Source) -> Path:
    """The corpus's place in the cache: everything that decides the tokens, hashed, without reading the text."""
    key = [FORMAT, source.name, source.identity(), data.max_documents, tokenizer_identity(data), _chunk_len(data)]
    return _cache_dir(data) / "corpora" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def check(data: DataConfig) -> None:
    """Raise UserError for what is wrong with source and tokenizer and can be seen quickly. Writes nothing."""
    source = SOURCES[data.source](data)
    if not cache_folder(data, source).is_dir():
        source.check()
        check_tokenizer(data)


def prepare(data: DataConfig, report: Report = print) -> Corpus:
    """The corpus that `data` describes; tokenised now unless the cache has it. Raises UserError before writing."""
    source = SOURCES[data.source](data)
    folder = cache_folder(data, source)
    if not folder.is_dir():
        source.check()
        check_tokenizer(data)
        with alone(folder, report) as temporary:
            if not folder.is_dir():
                _write(data, source, temporary, report)
                temporary.rename(folder)
    corpus = _open(folder, data)
    if not corpus.tokenizer.lossless:
        report(f"data.tokenizer={data.tokenizer} is not lossless: some text does not come back as it was.")
    elif corpus.tokenizer.kind == "json":
        report(f"data.tokenizer={data.tokenizer} is lossless, as far as a few hard strings show.")
    return corpus


TRIES = 100  # to have a lock whose folder disappears


@contextmanager
def alone(folder: Path, report: Report) -> Iterator[Path]:
    """Hold the lock of a corpus and give the name to write it under. Work that fails leaves nothing behind."""
    made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    temporary = folder.with_suffix(".tmp")
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        _acquire(lock, report)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder.parent} cannot be written ({error}). Name another.", EXIT_DATA
        ) from None
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, OSError):  # what the text's own files do wrong is a UserError by now
            raise UserError(f"data.cache_dir: writing to {folder.parent} failed ({error}).", EXIT_DATA) from None
        raise
    finally:
        lock.release()


def _acquire(lock: FileLock, report: Report) -> None:
    """Wait for the lock. A process that fails takes the folders along that it had made, from under those who wait."""
    folder, waiting = Path(lock.lock_file).parent, False
    for _ in range(TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=-1 if waiting else 1)
            return
        except Timeout:
            report("Another process is preparing this corpus; waiting for it.")
            waiting = True
        except FileNotFoundError:
            continue
    raise FileNotFoundError(f"{folder} was taken away {TRIES} times")


# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class _Stream:
    """A split that is read from its source each time it is walked through."""

    source: Source
    split: str

    def __iter__(self) -> Iterator[Document]:
        return iter(self.source.documents(self.split))


def _divide(data: DataConfig, source: Source) -> Split:
    """The splits of a source. To divide them, all documents are held in memory, about three bytes a byte of text."""
    if source.own_splits:
        return Split({name: _Stream(source, name) for name in ("train", "val")}, {})
    return split_documents(source.documents("train"), data.max_documents)


def _write(data: DataConfig, source: Source, folder: Path, report: Report) -> None:
    """Read, divide and tokenise the text into `folder`, which the caller throws away if this raises."""
    report(f"Reading {source.name} ...")
    split = _divide(data, source)
    if not split.documents:
        raise UserError(f"data.source={data.source}: there is no text, only white space.", EXIT_DATA)
    tokenizer = build_tokenizer(data, lambda: (document.text for document in split.documents["train"]))
    if data.tokenizer == "trained" and tokenizer.n_vocab < data.vocab_size:
        report(f"The text has pairs for only {tokenizer.n_vocab} of data.vocab_size={data.vocab_size} tokens.")
    folder.mkdir()
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    counts = {}
    for name, documents in split.documents.items():
        counts[name] = _write_split(folder / f"{name}.bin", documents, tokenizer, dtype, _chunk_len(data))
        report(f"Tokenised {name}: {counts[name]['tokens']:,} tokens of {counts[name]['documents']:,} documents.")
    _usable_splits(data, counts)
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
    path: Path, documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype, chunk_len: int | None
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
    for name in counts:
        if name != "train":
            counts[name]["window_overlap"] = split.overlap.get(name)  # null: not measured
    whole = json.dumps([tokenizer.fingerprint, dtype.name, {name: counts[name]["sha256"] for name in sorted(counts)}])
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest(),
        "source": source.name,
        "path": data.path,
        "max_documents": data.max_documents,
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
        "split_by": "the source" if source.own_splits else "content hash",
        "splits": counts,
        "held_out_packages": split.packages,
        "near_duplicates_removed": (
            None if source.own_splits else {"documents": split.near_duplicates, "bytes": split.near_duplicate_bytes}
        ),
        "left_out": {"blank": split.blank, "held_out_but_in_train": split.dropped},
        "val_is_the_end_of": split.cut,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("tiktoken", "tokenizers")}},
    }


# ----------------------------------------------------------------------------------------------------------------------


def _usable_splits(data: DataConfig, counts: dict[str, Any]) -> tuple[str, ...]:
    """The splits that hold a block of `data.seq_len`. Raises UserError unless train and val do."""
    seq_len = data.seq_len or DEFAULT_SEQ_LEN
    need = seq_len + (data.chunks == "packed")
    for name in ("train", "val"):
        if counts[name]["tokens"] < need:
            everything = sum(part["tokens"] for part in counts.values())
            raise UserError(
                f"data.seq_len={seq_len}: a block needs {need} tokens, and {name} has {counts[name]['tokens']} (the "
                f"whole corpus {everything}). Give data.source={data.source} more text, or lower data.seq_len.",
                EXIT_DATA,
            )
    return tuple(name for name, part in counts.items() if part["tokens"] >= need)


def _open(folder: Path, data: DataConfig) -> Corpus:
    """A corpus of the cache, its files checked against the manifest and against what the settings ask of it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokenizer = load_tokenizer(folder / "tokenizer")
        check_manifest(manifest, tokenizer.n_vocab)
        for name, counts in manifest["splits"].items():
            path = folder / f"{name}.bin"
            check_ids(path, counts["tokens"], counts["sha256"], manifest["dtype"], tokenizer.n_vocab)
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(
            f"the cached corpus is damaged ({error}). Delete {folder} and start again.", EXIT_DATA
        ) from None
    if data.fingerprint is not None and data.fingerprint != manifest["fingerprint"]:
        raise UserError(
            f"data.fingerprint={data.fingerprint}, but the corpus is {manifest['fingerprint']}: its text or its "
            "tokenizer is not the one that was asked for. Set data.fingerprint=null to accept it.",
            EXIT_DATA,
        )
    return Corpus(folder, manifest, tokenizer, _usable_splits(data, manifest["splits"]))

"""Whether the files of a tokenised corpus are what was written: their list, size, ids and sha256."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "val", "val_package")
DTYPES = ("uint16", "uint32")
CHUNK = 1 << 24  # bytes read at once


def check_manifest(manifest: Any, n_vocab: int) -> None:
    """Raise ValueError unless a manifest says what it must, of a tokenizer of `n_vocab` ids."""
    try:
        if manifest["dtype"] not in DTYPES:
            raise ValueError(f"ids of type {manifest['dtype']!r}")
        if manifest["tokenizer"]["n_vocab"] != n_vocab:
            raise ValueError(f"its tokenizer has {n_vocab} ids, not {manifest['tokenizer']['n_vocab']}")
        if not {"train", "val"} <= set(manifest["splits"]) <= set(SPLITS):
            raise ValueError(f"splits {', '.join(map(repr, manifest['splits']))}")
        numbers = [counts[name] for counts in manifest["splits"].values() for name in ("tokens", "bytes", "documents")]
        chunk_len = manifest["chunk_len"]
        if not all(type(n) is int and n >= 0 for n in numbers) or not (chunk_len is None or type(chunk_len) is int):
            raise ValueError("its counts are no counts")
        texts = [manifest["fingerprint"], *(counts["sha256"] for counts in manifest["splits"].values())]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its digests are no digests")
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"manifest.json is not what was written ({type(error).__name__}: {error})") from None


def check_ids(path: Path, tokens: int, sha256: str, dtype: str, n_vocab: int) -> None:
    """Read a split once. Raises ValueError, which names the file and the place, unless it is whole and as it was.

    An id that the tokenizer has not would be an index out of the embedding, on a GPU an error without a name.
    """
    size, itemsize = path.stat().st_size, np.dtype(dtype).itemsize
    if size != tokens * itemsize:
        odd = f", which is no multiple of {itemsize}" if size % itemsize else ""
        raise ValueError(f"{path} has {size} bytes{odd}, not {tokens * itemsize}: it ends at offset {size}")
    digest, offset = hashlib.sha256(), 0
    with path.open("rb") as file:
        while content := file.read(CHUNK):
            digest.update(content)
            ids = np.frombuffer(content, dtype=dtype)
            if ids.max() >= n_vocab:
                first = int(np.argmax(ids >= n_vocab))
                place = offset + first * itemsize
                raise ValueError(f"{path} has id {ids[first]} at offset {place}, and the tokenizer has {n_vocab} ids")
            offset += len(content)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} is not what was written: sha256 {digest.hexdigest()[:12]}, not {sha256[:12]}")

"""Numbers into the page: which records of a long run are kept, and how an array is written as text.

Entropy records and counts are kept as recorded, up to `MAX_RECORDS` a run, statistics with one number a layer up to
`MAX_LAYER_RECORDS`. A scalar is a curve of at most about `MAX_POINTS`. Whatever is left out is counted, so that the
page can say so.
"""

import base64
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

MAX_RECORDS = 300
MAX_LAYER_RECORDS = 150  # of statistics with one number a layer, of which there may be many
MAX_POINTS = 2000
EXACT_INTEGER = 2**53  # the largest up to which every integer is a float64
TYPES = {"f": "<f4", "g": "<f8"}  # the letter in the page -> dtype


def pack(values: np.ndarray) -> dict[str, Any]:
    """An array as text: base64 of the deflated byte planes of its little-endian values. Every bit comes back.

    float32 stays float32; everything else becomes float64, which holds every count below 2**53 exactly. Byte planes
    (all lowest bytes, then all second ones, ...) halve the size: neighbouring values share their upper bytes.
    """
    letter = "f" if values.dtype == np.float32 else "g"
    if values.dtype.kind in "iu":
        assert not values.size or np.abs(values).max() < EXACT_INTEGER, "a count beyond 2**53"
    plain = np.ascontiguousarray(values, dtype=TYPES[letter])
    planes = plain.reshape(-1).view(np.uint8).reshape(plain.size, plain.itemsize).T
    text = base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")
    return {"packed": letter, "shape": list(values.shape), "text": text}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """What `pack` was given (integers as float64); the scripts of the page do the same."""
    dtype = np.dtype(TYPES[packed["packed"]])
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["text"])), np.uint8)
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).view(dtype).reshape(packed["shape"])


def kept_records(steps: np.ndarray, near: Iterable[int] = (), most: int = MAX_RECORDS) -> np.ndarray:
    """Indices of the records to keep, increasing: all, or `most` of them evenly spaced, first and last included.

    `near`: steps that matter, say of a fault; the last record before each and the first one from it on are kept too.
    """
    n = len(steps)
    if n <= most:
        return np.arange(n)
    must = {i for step in near for i in (np.searchsorted(steps, step) - 1, np.searchsorted(steps, step)) if 0 <= i < n}
    spaced = np.linspace(0, n - 1, max(most - len(must), 2)).round().astype(np.int64)
    return np.union1d(spaced, np.array(sorted(must), np.int64))


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most about `most` points, as it looks when drawn.

    Of each bucket of neighbours the smallest and the largest value stay, and the first that is not finite; so do both
    ends. A shorter curve is left as it is.
    """
    n = len(steps)
    if n <= most:
        return steps, values
    kept = {0, n - 1}
    for bucket in np.array_split(np.arange(n), most // 2):
        part = values[bucket]
        finite = bucket[np.isfinite(part)]
        if len(finite):
            kept |= {int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])}
        if len(finite) < len(bucket):
            kept.add(int(bucket[np.argmin(np.isfinite(part))]))
    index = np.array(sorted(kept))
    return steps[index], values[index]

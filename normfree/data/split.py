"""Which documents are trained on and which are held out, so that held-out text is really new.

The measure of sameness is the window: five consecutive lines, stripped, blank ones left out. A document of which half
the windows stand in an earlier one is dropped. What is held out may share at most one window in a hundred with the
training split. Every choice follows from content hashes: not from paths, and not from the order of files.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from normfree.data.sources import Document

LINES = 5  # of a window
NEAR_DUPLICATE = 0.5  # share of a document's windows that were seen before
MOST_SHARED = 0.01  # of a held-out split's windows, that may occur in train
HELD_OUT = 0.05  # bytes of val, and of val_package, as a share of all
LARGEST_PACKAGE = 0.25  # of all bytes, that may be held out where every package is large
HELD_OUT_BYTES = (8 * 1024, 8 * 2**20)  # bounds of the same: too small to measure a loss, more than anyone evaluates
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def line_windows(text: str) -> np.ndarray:
    """uint64 hashes of the windows of a text; a text of fewer lines is one window, one without any has none."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    digests = b"".join(hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines)
    hashes = np.frombuffer(digests, dtype="<u8")
    width = min(LINES, len(hashes))
    if not width:
        return np.zeros(0, dtype=np.uint64)
    windows = np.zeros(len(hashes) - width + 1, dtype=np.uint64)
    for offset in range(width):
        windows = windows * _MULTIPLIER + hashes[offset : offset + len(windows)]
    return windows


@dataclass(slots=True)
class _Item:
    """A document with what the decisions need."""

    document: Document
    digest: bytes
    size: int  # bytes of UTF-8
    windows: np.ndarray


@dataclass
class Split:
    """The documents of each split in file order, and what was done to get there."""

    documents: dict[str, Iterable[Document]]
    overlap: dict[str, float]  # share of the split's windows that occur in train
    packages: list[str] = field(default_factory=list)  # held out whole, in val_package
    blank: int = 0  # documents without a visible character, left out
    near_duplicates: int = 0
    near_duplicate_bytes: int = 0
    dropped: int = 0  # documents of held-out packages left out because they repeat train
    cut: str | None = None  # the document whose end is val, where whole ones would have been too much


def _item(document: Document) -> _Item:
    encoded = document.text.encode()
    return _Item(document, hashlib.sha256(encoded).digest(), len(encoded), line_windows(document.text))


def _by_window(items: Sequence[_Item], group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows of all documents, sorted, then by group: (item of each, its group, start of each equal run)."""
    owner = np.repeat(np.arange(len(items)), [len(item.windows) for item in items])
    windows = np.concatenate([item.windows for item in items])
    order = np.lexsort((group[owner], windows))
    windows, owner = windows[order], owner[order]
    starts = np.flatnonzero(np.concatenate([[True], windows[1:] != windows[:-1]]))
    return owner, group[owner], starts


def _spread(values: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """One value a run -> one value a window."""
    return np.repeat(values, np.diff(np.append(starts, n)))


def _near_duplicates(items: Sequence[_Item]) -> np.ndarray:
    """bool (n,): at least half of the windows stand in an earlier document."""
    owner, group, starts = _by_window(items, np.arange(len(items)))
    seen = _spread(group[starts], starts, len(owner)) < owner
    counts = np.bincount(owner, minlength=len(items))
    return np.bincount(owner, weights=seen, minlength=len(items)) >= NEAR_DUPLICATE * counts


def _shared(items: Sequence[_Item], group: np.ndarray) -> np.ndarray:
    """int (n,): how many windows of each document also occur in a document of another group."""
    owner, groups, starts = _by_window(items, group)
    ends = np.append(starts[1:], len(owner)) - 1
    foreign = _spread(groups[starts] != groups[ends], starts, len(owner))
    return np.bincount(owner, weights=foreign, minlength=len(items)).astype(np.int64)


def _target(total: int) -> int:
    """Bytes to hold out of `total`."""
    low, high = HELD_OUT_BYTES
    return min(max(int(HELD_OUT * total), min(low, total // 5)), high)


def _choose_packages(items: Sequence[_Item]) -> set[str]:
    """Packages to hold out whole, in the order of their hash; none where there are only two or three large ones."""
    sizes: dict[str, int] = defaultdict(int)
    for item in items:
        if item.document.package is not None:
            sizes[item.document.package] += item.size
    if len(sizes) < 2:
        return set()
    total = sum(item.size for item in items)
    target, taken = _target(total), 0
    chosen: set[str] = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if taken < target and taken + sizes[name] <= 2 * target:
            chosen.add(name)
            taken += sizes[name]
    smallest = min(sizes, key=lambda name: (sizes[name], name))
    return chosen or ({smallest} if sizes[smallest] <= LARGEST_PACKAGE * total else set())


def _accept(items: Sequence[_Item], shared: np.ndarray, target: int, most: int | None) -> list[int]:
    """Indices, in order, of documents that together share few enough windows and reach about `target` bytes."""
    taken, windows, repeated = 0, 0, 0
    chosen: list[int] = []
    for i, item in enumerate(items):
        if taken >= target or (most is not None and len(chosen) >= most):
            break
        few = repeated + shared[i] <= MOST_SHARED * (windows + len(item.windows))
        if few and taken + item.size <= 2 * target:
            chosen.append(i)
            taken, windows, repeated = taken + item.size, windows + len(item.windows), repeated + int(shared[i])
    return chosen


def _cut_end(items: list[_Item]) -> tuple[list[_Item], list[_Item], str]:
    """Hold out the last twentieth of the longest document: (train, val, label), for a text in one or a few pieces."""
    longest = max(range(len(items)), key=lambda i: items[i].size)
    document = items[longest].document
    at = len(document.text) - max(1, _target(len(document.text)))
    at = document.text.rfind("\n", at // 2, at) + 1 or at
    head, tail = (_item(replace(document, text=text)) for text in (document.text[:at], document.text[at:]))
    return [*items[:longest], head, *items[longest + 1 :]], [tail], document.label


def _overlap(train: Sequence[_Item], held_out: Sequence[_Item]) -> float:
    """Share of the windows of `held_out` that occur in `train`, counted anew."""
    known = np.unique(np.concatenate([item.windows for item in train]))
    windows = np.concatenate([item.windows for item in held_out])
    if not len(known) or not len(windows):
        return 0.0
    at = np.minimum(np.searchsorted(known, windows), len(known) - 1)
    return float(np.mean(known[at] == windows))


def split_documents(documents: Iterable[Document], max_documents: int | None = None) -> Split:
    """Drop near-duplicates; divide the rest into train, val and, where there are packages, val_package.

    `max_documents` limits each split. Documents without a visible character are left out. No documents give no splits.
    """
    read = [_item(document) for document in documents]
    every = sorted((item for item in read if len(item.windows)), key=lambda i: (i.digest, i.document.package or ""))
    split = Split({}, {}, blank=len(read) - len(every))
    if not every:
        return split
    duplicate = _near_duplicates(every)
    items = [item for item, drop in zip(every, duplicate, strict=True) if not drop]
    split.near_duplicates = int(duplicate.sum())
    split.near_duplicate_bytes = sum(item.size for item, drop in zip(every, duplicate, strict=True) if drop)
    target = _target(sum(item.size for item in items))

    packages = _choose_packages(items)
    inside = np.array([item.document.package in packages for item in items])
    shared = _shared(items, inside.astype(np.int64))[inside]
    apart = [item for item, held in zip(items, inside, strict=True) if held]
    by_package = [apart[i] for i in _accept(apart, shared, 2 * target, max_documents)]
    if by_package:
        split.dropped = len(apart) - len(by_package)
        split.packages = sorted(packages)
        items = [item for item, held in zip(items, inside, strict=True) if not held]

    chosen = set(_accept(items, _shared(items, np.arange(len(items))), target, max_documents))
    val = [items[i] for i in sorted(chosen)]
    train = [item for i, item in enumerate(items) if i not in chosen]
    if not val:
        train, val, split.cut = _cut_end(train)
    for name, part in (("train", train[:max_documents]), ("val", val), ("val_package", by_package)):
        if part:
            split.documents[name] = [item.document for item in part]
            if name != "train":
                split.overlap[name] = _overlap(train[:max_documents], part)
    return split

"""From a step number to a batch: a pure function of (seed, step), with no iterator to save or restore.

The tokens of a split are cut into blocks of T. Each epoch visits every block once, in an order drawn by a keyed
permutation that is computed for the wanted positions only, so that a corpus of any size costs no memory.
"""

import numpy as np

from normfree.config import IGNORED
from normfree.errors import EXIT_DATA, UserError

ROUNDS = 8
AHEAD = 8192  # blocks that are permuted at once: a few hundred of them take almost as long, in NumPy's calls
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Bijection of 64-bit integers in which every input bit reaches every output bit (SplitMix64's finalizer)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, n: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where each of `positions` (all below n) goes in the permutation of range(n) drawn by (seed, epoch).

    A Feistel network permutes the next power of four; a value that falls outside range(n) is sent through again until
    it is inside, which keeps the whole a bijection (cycle walking; under four rounds on average).
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.full(1, seed, dtype=np.uint64) + _GOLDEN) ^ (epochs.astype(np.uint64) * _GOLDEN))
    round_keys = [_mix(key + np.uint64(r)) for r in range(ROUNDS)]

    def once(x: np.ndarray, select: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key[select]) & mask)
        return (left << half) | right

    everything = np.arange(len(positions))
    out = once(positions.astype(np.uint64), everything)
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = once(out[outside], outside)
    return out.astype(np.int64)


def _count_blocks(n_tokens: int, seq_len: int, chunk_len: int | None) -> int:
    """Blocks in a split; a block needs its T tokens and the next one, a chunk only its own T."""
    if chunk_len is not None and chunk_len != seq_len:
        raise UserError(f"data.seq_len={seq_len}, but the corpus was cut into chunks of {chunk_len}.", EXIT_DATA)
    n_blocks = n_tokens // seq_len if chunk_len else (n_tokens - 1) // seq_len
    if n_blocks < 1:
        need = seq_len if chunk_len else seq_len + 1
        raise UserError(
            f"data.seq_len={seq_len}: one block needs {need} tokens, and the corpus has {n_tokens}. "
            "Give it more text, or lower data.seq_len.",
            EXIT_DATA,
        )
    return n_blocks


def _rows(tokens: np.ndarray, blocks: np.ndarray, seq_len: int, chunk_len: int | None) -> np.ndarray:
    """Blocks (N,) -> int64 (N, T+1). A chunk ends with its text, so its last column is the ignored target."""
    width = seq_len if chunk_len else seq_len + 1
    windows = np.lib.stride_tricks.sliding_window_view(tokens, width)[::seq_len]  # a view: block after block
    rows = windows[blocks].astype(np.int64)
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=IGNORED) if chunk_len else rows


class Batches:
    """The training batches of one run."""

    def __init__(
        self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int, chunk_len: int | None = None
    ) -> None:
        """`tokens`: 1-d, of any integer type, usually a memory map. Raises UserError if it holds no whole block."""
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.chunk_len = chunk_len
        self.n_blocks = _count_blocks(len(tokens), seq_len, chunk_len)
        self._steps = max(1, AHEAD // batch_size)  # whose block numbers are worked out together, and kept:
        self._first, self._known = -1, np.empty((0, batch_size), dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """The block numbers (batch_size,) of a step, counted from 0. A batch may end one epoch and begin the next."""
        first = step - step % self._steps
        if first != self._first:
            size = self._steps * self.batch_size
            samples = first * self.batch_size + np.arange(size, dtype=np.int64)
            known = permute(samples % self.n_blocks, self.n_blocks, self.seed, samples // self.n_blocks)
            self._first, self._known = first, known.reshape(self._steps, self.batch_size)
        return self._known[step - first]

    def rows(self, step: int) -> np.ndarray:
        """int64 (batch_size, T+1): inputs are `[:, :-1]`, targets `[:, 1:]`."""
        return _rows(self.tokens, self.indices(step), self.seq_len, self.chunk_len)

    def epoch(self, step: int) -> float:
        """How often the split has been seen before this step."""
        return step * self.batch_size / self.n_blocks


def evaluation_rows(tokens: np.ndarray, seq_len: int, n_tokens: int, chunk_len: int | None = None) -> np.ndarray:
    """int64 (N, T+1): the first blocks of a split in file order, always the same; about `n_tokens` tokens.

    The file is ordered by content hash, so its beginning is a fair sample of the split. At least one block.
    """
    n = min(_count_blocks(len(tokens), seq_len, chunk_len), max(1, n_tokens // seq_len))
    return _rows(tokens, np.arange(n), seq_len, chunk_len)

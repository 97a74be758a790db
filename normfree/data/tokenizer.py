"""Text to token ids and back: one protocol, four built-in tokenizers, and any tokenizer.json.

The built-in ones give every Unicode text back exactly. Text is always ordinary text: a special token's string in it is
encoded as the characters it is made of.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from normfree.config import DataConfig
from normfree.data import bpe
from normfree.errors import EXIT_DATA, UserError, unknown
from normfree.tables import TOKENIZERS

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 32 * 2**20  # `trained` reads this much of the training split: more text hardly changes the merges
META_FILE = "tokenizer_meta.json"
RANK_FILE = "ranks.tiktoken"
JSON_FILE = "tokenizer.json"

Texts = Callable[[], Iterable[str]]  # the training split, read when called


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer. Ids are below `n_vocab`; `end_of_text` is one of them."""

    kind: str  # how `load_tokenizer` rebuilds it
    name: str
    n_vocab: int
    end_of_text: int
    fingerprint: str  # sha256 of everything that decides the ids
    lossless: bool  # decode(encode(text)) == text for every text

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (uint32) of each text, without end-of-text."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a cut character) become U+FFFD."""

    def files(self) -> dict[str, bytes]:
        """File name -> content of what `load_tokenizer` needs besides the name."""


def _require_unicode(texts: Sequence[str]) -> None:
    """Refuse halves of surrogate pairs, which are no characters and have no UTF-8."""
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
                    "it is not valid Unicode.",
                    EXIT_DATA,
                ) from None


class ByteTokenizer:
    """The 256 bytes of UTF-8, and end-of-text."""

    kind = "bytes"
    name = "bytes"
    n_vocab = 257
    end_of_text = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, end-of-text 256").hexdigest()
    lossless = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        _require_unicode(texts)
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        end = END_OF_TEXT.encode()
        return b"".join(end if i == self.end_of_text else bytes([i]) for i in map(int, ids)).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}


class BpeTokenizer:
    """A byte-level BPE in tiktoken. End-of-text is the last id."""

    kind = "bpe"
    lossless = True

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self.name = name
        self.end_of_text = len(ranks)
        self.n_vocab = len(ranks) + 1
        self._rank_file = bpe.format_ranks(ranks)
        self.fingerprint = hashlib.sha256(bpe.PATTERN.encode() + b"\n" + self._rank_file).hexdigest()
        self._encoding = tiktoken.Encoding(
            name, pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.end_of_text}
        )
        self._threads = min(os.cpu_count() or 1, 8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        _require_unicode(texts)
        encoded = self._encoding.encode_ordinary_batch(list(texts), num_threads=self._threads)
        return [np.array(ids, dtype=np.uint32) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def files(self) -> dict[str, bytes]:
        return {RANK_FILE: self._rank_file}


# ----------------------------------------------------------------------------------------------------------------------
# The choices of data.tokenizer. Each is called with the settings and the training split.


def load_bytes(data: DataConfig, texts: Texts) -> Tokenizer:
    return ByteTokenizer()


def _code8k_file() -> bytes:
    return resources.files("normfree.data").joinpath("assets", "code8k.tiktoken").read_bytes()


def load_code8k(data: DataConfig, texts: Texts) -> Tokenizer:
    """8192 tokens for Python source; `experiments/train_code8k.py` made the rank file."""
    return BpeTokenizer("code8k", bpe.parse_ranks(_code8k_file()))


def train_tokenizer(data: DataConfig, texts: Texts) -> Tokenizer:
    """A BPE of `data.vocab_size` tokens, end-of-text included; fewer where the text has no more pairs to merge."""

    def sample() -> Iterable[str]:
        left = TRAINING_BYTES
        for text in texts():
            yield text
            left -= len(text)
            if left <= 0:
                return

    return BpeTokenizer("trained", bpe.train_bpe(sample(), data.vocab_size - 1))


def build_tokenizer(data: DataConfig, texts: Texts) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. `texts` gives the training split, for the one that is trained."""
    if data.tokenizer in TOKENIZERS:
        return TOKENIZERS[data.tokenizer](data, texts)
    raise UserError(unknown("data.tokenizer", data.tokenizer, TOKENIZERS), EXIT_DATA)


def tokenizer_identity(data: DataConfig) -> str:
    """What decides the tokenizer, found without loading or training it: a part of the corpus's place in the cache."""
    if data.tokenizer == "code8k":
        return "code8k " + hashlib.sha256(_code8k_file()).hexdigest()
    if data.tokenizer == "trained":
        return f"trained {data.vocab_size} on {TRAINING_BYTES}"
    if data.tokenizer in TOKENIZERS:
        return data.tokenizer
    raise UserError(unknown("data.tokenizer", data.tokenizer, TOKENIZERS), EXIT_DATA)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write all that `load_tokenizer` needs (under 2 MB), so that a run can decode without its corpus."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)
    meta = {"kind": tokenizer.kind, "name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    (directory / META_FILE).write_text(json.dumps(meta, indent=1) + "\n")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote. Raises UserError if a file is missing or was changed."""
    try:
        meta: dict[str, Any] = json.loads((directory / META_FILE).read_text())
        if meta["kind"] == "bytes":
            tokenizer: Tokenizer = ByteTokenizer()
        else:
            tokenizer = BpeTokenizer(meta["name"], bpe.parse_ranks((directory / RANK_FILE).read_bytes()))
        if tokenizer.fingerprint != meta["fingerprint"]:
            raise ValueError("its content is not what was saved")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}", EXIT_DATA) from None
    return tokenizer

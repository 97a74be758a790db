"""Byte-level BPE: training, and the rank file that holds the result.

A rank file has one token a line: its bytes in base64, a space, its id. Ids are merge ranks, the 256 single bytes first.
"""

import base64
import binascii
from collections.abc import Iterable

# GPT-2's rule for where a token may not cross: contractions, then runs of letters, digits, other signs, white space.
# The possessive forms match what the plain ones do, without the backtracking that long runs would cost.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def byte_characters() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte -> the byte (GPT-2's mapping)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Ranks of at most `vocab_size` tokens (at least 256, the bytes). The same texts in order give the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    to_byte = byte_characters()
    return {bytes(to_byte[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The rank file of `ranks`, in order of rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """The ranks in a rank file. Raises ValueError if it is damaged."""
    ranks = {}
    for line in content.splitlines():
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except binascii.Error as error:
            raise ValueError(f"{line!r} is not base64: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("its ranks are not 0, 1, 2, ... over all 256 bytes and more")
    return ranks

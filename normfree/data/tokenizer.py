"""Text to token ids and back: one protocol, four built-in tokenizers, and any tokenizer.json.

The built-in ones give every Unicode text back exactly. Text is always ordinary text: a special token's string in it is
encoded as the characters it is made of.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from normfree.config import DataConfig
from normfree.data import bpe, network
from normfree.data.readers import home
from normfree.errors import EXIT_DATA, UserError, unknown
from normfree.tables import TOKENIZERS

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 32 * 2**20  # `trained` reads this much of the training split: more text hardly changes the merges
LONGEST_SPACE = 400_000  # a longer run of white space overflows the stack of tiktoken's pattern
META_FILE = "tokenizer_meta.json"
RANK_FILE = "ranks.tiktoken"
JSON_FILE = "tokenizer.json"

Texts = Callable[[], Iterable[str]]  # the training split, read when called

# Names that tokenizer files give to end-of-text; the file itself does not say which token it is.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>", "[SEP]")
# Each of these is lost by some common kind of tokenizer.
PROBES = (
    " a  b ",
    "\tif x:\r\n\n",
    "MiXeD",
    "caf\u00e9 cafe\u0301 \ufb01",
    "\u65e5\u672c \U0001f916\u200d",
    "\0\a",
    "don't , ok .",
    END_OF_TEXT,
)
# Where tiktoken gets GPT-2's vocabulary, and the sha256 that it asks of each file.
GPT2_FILES = {
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
}


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

    def n_bytes(self, ids: np.ndarray) -> int:
        """How many bytes of UTF-8 `ids` stand for, parts of characters included."""

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


def _cut_long_space(text: str) -> list[str]:
    """The text in pieces none of which has a run of white space longer than LONGEST_SPACE; nearly always one piece."""
    if len(text) <= LONGEST_SPACE:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s++", text):
        cuts += range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


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

    def n_bytes(self, ids: np.ndarray) -> int:
        return len(ids) + int((ids == self.end_of_text).sum()) * (len(END_OF_TEXT) - 1)

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
        pieces = [_cut_long_space(text) for text in texts]
        encoded = self._encoding.encode_ordinary_batch([p for cut in pieces for p in cut], num_threads=self._threads)
        arrays = iter([np.array(ids, dtype=np.uint32) for ids in encoded])
        return [np.concatenate([next(arrays) for _ in cut]) if len(cut) > 1 else next(arrays) for cut in pieces]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def n_bytes(self, ids: np.ndarray) -> int:
        return len(self._encoding.decode_bytes([int(i) for i in ids]))

    def files(self) -> dict[str, bytes]:
        return {RANK_FILE: self._rank_file}


class JsonTokenizer:
    """A tokenizer.json, as the `tokenizers` library reads it."""

    kind = "json"

    def __init__(self, name: str, content: bytes) -> None:
        from tokenizers import Tokenizer as Rust

        try:
            self._tokenizer = Rust.from_str(content.decode())
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"data.tokenizer: {name} is not a tokenizer.json ({error}).", EXIT_DATA) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are plain text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[end] for end in END_NAMES if end in vocabulary]
        if not ends:
            raise UserError(
                f"data.tokenizer: {name} has no end-of-text token; one of {', '.join(END_NAMES)} is needed.", EXIT_DATA
            )
        self.name = name
        self.n_vocab = max(vocabulary.values()) + 1
        self.end_of_text = ends[0]
        self._content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()
        encoded = self.encode_batch(PROBES)
        self.lossless = all(self.decode(ids) == text for ids, text in zip(encoded, PROBES, strict=True))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        _require_unicode(texts)
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"data.tokenizer: {self.name} cannot encode every text: {error}", EXIT_DATA) from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def n_bytes(self, ids: np.ndarray) -> int:
        return len(self.decode(ids).encode(errors="replace"))  # the library has text alone: a cut character counts 3

    def files(self) -> dict[str, bytes]:
        return {JSON_FILE: self._content}


# ----------------------------------------------------------------------------------------------------------------------
# The choices of data.tokenizer. Each is called with the settings and the training split.


def load_bytes(data: DataConfig, texts: Texts) -> Tokenizer:
    return ByteTokenizer()


def _code8k_file() -> bytes:
    return resources.files("normfree.data").joinpath("assets", "code8k.tiktoken").read_bytes()


def load_code8k(data: DataConfig, texts: Texts) -> Tokenizer:
    """8192 tokens for Python source; `experiments/train_code8k.py` made the rank file."""
    return BpeTokenizer("code8k", bpe.parse_ranks(_code8k_file()))


def _gpt2_is_here() -> bool:
    """Whether tiktoken's own cache has both files, undamaged (it would download a damaged one anew)."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    for url, expected in GPT2_FILES.items():
        path = cache / hashlib.sha1(url.encode()).hexdigest()
        if folder == "" or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            return False
    return True


def load_gpt2(data: DataConfig, texts: Texts) -> Tokenizer:
    """GPT-2's 50257 tokens, which tiktoken downloads once (1.5 MB)."""
    from tiktoken_ext import openai_public

    if _gpt2_is_here() or network.reachable(next(iter(GPT2_FILES))):
        try:
            return BpeTokenizer("gpt2", openai_public.gpt2()["mergeable_ranks"])
        except OSError:  # the answer was not the file
            pass
    raise UserError(
        "data.tokenizer=gpt2: its vocabulary is downloaded once, and the server cannot be reached. Either choose "
        "data.tokenizer=code8k, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has already stored it, or give "
        "data.tokenizer the path of a tokenizer.json.",
        EXIT_DATA,
    )


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
    path = _path(data)
    return load_tokenizer(path) if path.is_dir() else JsonTokenizer(path.name, path.read_bytes())


def _path(data: DataConfig) -> Path:
    """A tokenizer.json, or the folder of a run that `save_tokenizer` wrote."""
    path = home(data.tokenizer, "data.tokenizer")
    if (path / META_FILE).is_file():
        return path
    path = path / JSON_FILE if path.is_dir() else path
    if not path.is_file():
        choices = unknown("data.tokenizer", data.tokenizer, TOKENIZERS)
        raise UserError(
            f"{choices} Or give the path of a tokenizer.json, or of a run's tokenizer/: there is no file {path}.",
            EXIT_DATA,
        )
    return path


def check_tokenizer(data: DataConfig) -> None:
    """Raise UserError if `data.tokenizer` cannot be loaded here."""
    if data.tokenizer != "trained":
        build_tokenizer(data, lambda: ())


def tokenizer_identity(data: DataConfig) -> str:
    """What decides the tokenizer, found without loading or training it: a part of the corpus's place in the cache."""
    if data.tokenizer == "code8k":
        return "code8k " + hashlib.sha256(_code8k_file()).hexdigest()
    if data.tokenizer == "trained":
        return f"trained {data.vocab_size} on {TRAINING_BYTES}"
    if data.tokenizer in TOKENIZERS:
        return data.tokenizer
    path = _path(data)
    if path.is_dir():
        return "saved " + load_tokenizer(path).fingerprint
    return "json " + hashlib.sha256(path.read_bytes()).hexdigest()


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
        elif meta["kind"] == "json":
            tokenizer = JsonTokenizer(meta["name"], (directory / JSON_FILE).read_bytes())
        else:
            tokenizer = BpeTokenizer(meta["name"], bpe.parse_ranks((directory / RANK_FILE).read_bytes()))
        if tokenizer.fingerprint != meta["fingerprint"]:
            raise ValueError("its content is not what was saved")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}", EXIT_DATA) from None
    return tokenizer


def require_same_tokenizer(origin: str, directory: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the tokenizer saved in `directory` is `tokenizer`: the same ids would be other text.

    Vocabularies are rounded up, so the shapes of two models may agree where their tokenizers do not.
    """
    saved = load_tokenizer(directory)
    if saved.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{origin} was trained with the tokenizer {saved.name} ({saved.n_vocab} ids, sha256 {saved.fingerprint}), "
            f"and this corpus has {tokenizer.name} ({tokenizer.n_vocab} ids, sha256 {tokenizer.fingerprint}): the same "
            f"ids would be other text. Choose its own: data.tokenizer={directory}",
            EXIT_DATA,
        )

"""Where the text of a scale is on this machine, and its fingerprint: without it no result can be told from another."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from normfree.config import DataConfig
from normfree.data.packing import prepare
from normfree.errors import EXIT_DATA, UserError
from revival.cells import PUBLISHED_T, Cell

CORPUS = Path(__file__).parents[1] / "corpus"
TOKENIZER = "code32k.json"  # in CORPUS


@dataclass(frozen=True)
class Place:
    """`words`: the settings that name the text on this machine; they are in no result.

    `by_length`: data.seq_len -> fingerprint, where the text is cut into chunks of that length (data.chunks=original).
    """

    words: tuple[str, ...]
    fingerprint: str | None
    by_length: dict[int, str] = field(default_factory=dict)

    def words_of(self, cell: Cell) -> tuple[str, ...]:
        """The words for a cell, which pin the text of its length."""
        if not self.by_length:
            return self.words
        return (*self.words, f"data.fingerprint={self.by_length[cell.keys['data.seq_len']]}")


def corpus_facts() -> dict:
    """What experiments/revival_corpus.py committed of the fixed corpus: at least its fingerprint."""
    path = CORPUS / "corpus.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(facts["fingerprint"], str)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{path} does not say which corpus the study is made on: {error!r}", EXIT_DATA) from error
    return facts


def find(scale: str, corpus: Path | None, cells: Iterable[Cell] = ()) -> Place:
    """Prepare the text of a scale; what the first cell would do otherwise, while others wait for it.

    `cells`: those that are wanted; scale full is prepared for each of their sequence lengths, which takes hours.
    """
    if scale == "smoke":
        return Place((), _fingerprint(DataConfig(source="python_stdlib", tokenizer="bytes"), "The text of scale smoke"))
    if scale == "full":
        lengths = sorted({cell.keys["data.seq_len"] for cell in cells} or {PUBLISHED_T})
        found = {seq_len: _codeparrot(corpus, seq_len) for seq_len in lengths}
        path = (f"data.path={corpus.resolve()}",) if corpus else ()
        return Place(path, found.get(PUBLISHED_T), found)
    assert corpus is not None, scale
    fingerprint, tokenizer = corpus_facts()["fingerprint"], CORPUS / TOKENIZER
    made = "which python experiments/revival_corpus.py --out DIR makes"
    _fingerprint(
        DataConfig(source="files", path=str(corpus.resolve()), tokenizer=str(tokenizer), fingerprint=fingerprint),
        f"The text of scale short ({made}), --corpus {corpus}",
    )
    words = (f"data.path={corpus.resolve()}", f"data.tokenizer={tokenizer}", f"data.fingerprint={fingerprint}")
    return Place(words, fingerprint)


def _codeparrot(corpus: Path | None, seq_len: int) -> str:
    """Prepare CodeParrot, or the copy of it, in chunks of `seq_len` tokens: its fingerprint."""
    config = DataConfig(source="codeparrot", tokenizer="trained", vocab_size=50000, seq_len=seq_len)
    config.chunks, config.max_documents = "original", 600000
    config.path = str(corpus.resolve()) if corpus else None
    copy = "a copy of the set (train*.json.gz and valid*.json.gz)"
    if corpus:
        return _fingerprint(config, f"The text of scale full, --corpus {corpus}, {copy}")
    return _fingerprint(config, "The text of scale full", f" --corpus DIR names a folder with {copy}.")


# What prepare() says of settings, which nobody typed here: a pattern, and what is said instead.
SETTINGS = (
    (r"^data\.(path|seq_len=\d+): ", ""),
    (r"^data\.cache_dir: (.*?)( Name another\.)?$", r"\1 XDG_CACHE_HOME names another place of prepared text."),
    (r"^data=codeparrot is read", "it is read"),
    (r"^data=codeparrot: ", ""),
    (r" Either choose data=.*", ""),
    (r" Give data\.source=.*", ""),
    (r"^data\.fingerprint=(\w{12})\w*, but the corpus is (\w{12}).*", r"its fingerprint is \2, and the study's is \1."),
)


def _fingerprint(config: DataConfig, text: str, remedy: str = "") -> str:
    """Prepare a text: its fingerprint. A `UserError` speaks of `text` and what was typed."""
    try:
        return prepare(config, _say).fingerprint
    except UserError as error:
        why = str(error)
        for pattern, said in SETTINGS:
            why = re.sub(pattern, said, why)
        raise UserError(f"{text}: {why}{remedy}", error.exit_code) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def known_fingerprint(scale: str) -> str | None:
    """Of the text that results of a scale are on, without preparing it; None where that cannot be known."""
    return corpus_facts()["fingerprint"] if scale == "short" and (CORPUS / "corpus.json").exists() else None

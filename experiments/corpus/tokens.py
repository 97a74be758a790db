"""The tokenizer of the corpus: a byte-level BPE as `tokenizer.json`, which `data.tokenizer` takes by its path."""

import json
from collections.abc import Iterable

from normfree.data.tokenizer import END_OF_TEXT

VOCAB_SIZE = 32_768  # end-of-text, the last id, included
FILE = "code32k.json"


def train(texts: Iterable[str]) -> bytes:
    """The content of a tokenizer.json for `texts`; the same texts in order give the same.

    GPT-2's rule for where a token may not cross, no normalisation: every text comes back as it was. Fewer ids than
    VOCAB_SIZE where the text has no more pairs to merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    written = json.loads(tokenizer.to_str())
    written["model"]["merges"] = [" ".join(pair) for pair in written["model"]["merges"]]  # shorter, and older readers'
    return (json.dumps(written, ensure_ascii=False, separators=(",", ":")) + "\n").encode()

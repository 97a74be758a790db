"""Train the default tokenizer: a byte-level BPE of 8192 tokens on the training split of the standard library's source.

    python experiments/train_code8k.py

writes `normfree/data/assets/code8k.tiktoken` and prints its sha256. A few seconds on two cores. The committed file was
made by CPython 3.11.7; another interpreter brings another standard library, and so other merges.
"""

import argparse
import hashlib
from pathlib import Path

from normfree.config import DataConfig
from normfree.data.bpe import format_ranks, train_bpe
from normfree.data.sources import PythonStdlib
from normfree.data.split import split_documents

VOCAB_SIZE = 8192  # end-of-text, the last id, included
ASSET = Path(__file__).parents[1] / "normfree" / "data" / "assets" / "code8k.tiktoken"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSET, help="the rank file to write")
    out = parser.parse_args().out
    split = split_documents(PythonStdlib(DataConfig()).documents("train"))
    texts = [document.text for document in split.documents["train"]]
    content = format_ranks(train_bpe(texts, VOCAB_SIZE - 1))
    out.write_bytes(content)
    print(f"{out}: {VOCAB_SIZE} tokens from {len(texts)} documents, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()

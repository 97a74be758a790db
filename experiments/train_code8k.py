"""Train the default tokenizer: a byte-level BPE of 8192 tokens on the training split of the standard library's source.

    python experiments/train_code8k.py

writes `normfree/data/assets/code8k.tiktoken` and prints its sha256. A few seconds on two cores. The committed file was
made by CPython 3.11.7 (sha256 22ac9223...); another interpreter brings another standard library, and so other merges.
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
    parser.add_argument("--max-documents", type=int, help="train on fewer documents, to try the command")
    args = parser.parse_args()
    split = split_documents(PythonStdlib(DataConfig()).documents("train"), args.max_documents)
    texts = [document.text for document in split.documents["train"]]
    ranks = train_bpe(texts, VOCAB_SIZE - 1)
    content = format_ranks(ranks)
    args.out.write_bytes(content)
    print(
        f"{args.out}: {len(ranks) + 1} tokens from {len(texts)} documents, sha256 {hashlib.sha256(content).hexdigest()}"
    )


if __name__ == "__main__":
    main()

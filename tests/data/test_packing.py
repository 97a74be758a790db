"""The corpus on disk: what it holds, when it is made anew, and what happens when something goes wrong."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import quiet, write_corpus

from normfree.config import DataConfig
from normfree.data import bpe, packing
from normfree.data.batches import Batches
from normfree.data.packing import Corpus, alone, prepare
from normfree.data.sources import Document, Files
from normfree.data.split import split_documents
from normfree.data.tokenizer import END_OF_TEXT
from normfree.errors import EXIT_DATA, UserError


def with_(data: DataConfig, **changes: object) -> DataConfig:
    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def texts(data: DataConfig, split: str) -> list[str]:
    """The documents of a split, divided again from the source."""
    divided = split_documents(Files(data).documents("train"), data.max_documents)
    return [document.text for document in divided.documents[split]]


def test_documents_are_joined_by_end_of_text(small: DataConfig) -> None:
    corpus = prepare(small, quiet)
    assert corpus.splits == ("train", "val", "val_package")
    for name in corpus.splits:
        expected = texts(small, name)
        tokens = corpus.tokens(name)
        assert tokens.dtype == np.uint16
        assert corpus.tokenizer.decode(tokens) == "".join(text + END_OF_TEXT for text in expected)
        size = sum(len(text.encode()) for text in expected)
        counts = corpus.manifest["splits"][name]
        assert (counts["documents"], counts["bytes"], counts["tokens"]) == (len(expected), size, len(tokens))
        assert corpus.bytes_per_token(name) == size / len(tokens)


def test_the_manifest_says_what_was_held_out(small: DataConfig) -> None:
    manifest = prepare(small, quiet).manifest
    assert len(manifest["held_out_packages"]) == 1
    held = manifest["held_out_packages"][0]
    root = Path(str(small.path))
    documents = {path.read_text(): path.parent.name for path in root.rglob("*.txt")}
    assert {documents[text] for text in texts(small, "val_package")} == {held}
    assert held not in {documents[text] for name in ("train", "val") for text in texts(small, name)}
    assert manifest["splits"]["val"]["window_overlap"] == 0
    assert {"source", "licence", "dtype", "versions", "near_duplicates_removed"} <= set(manifest)


def test_held_out_packages_are_absent_from_the_default_corpus(stdlib: Corpus) -> None:
    from normfree.data.sources import PythonStdlib

    held = set(stdlib.manifest["held_out_packages"])
    assert held
    found = {name: set(stdlib.tokenizer.decode(stdlib.tokens(name)).split(END_OF_TEXT)) for name in stdlib.splits}
    of_held = {d.text for d in PythonStdlib(DataConfig()).documents("train") if d.package in held}
    assert found["val_package"] - {""} <= of_held
    assert not of_held & (found["train"] | found["val"])


def test_the_second_time_nothing_is_read(small: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(small, quiet)

    def never(*arguments: object) -> None:
        raise AssertionError("the text was read again")

    monkeypatch.setattr(packing, "split_documents", never)
    again = prepare(with_(small, seq_len=16), never)  # blocks are cut when they are read
    assert (again.directory, again.fingerprint) == (first.directory, first.fingerprint)
    with pytest.raises(AssertionError, match="read again"):
        prepare(with_(small, max_documents=3), quiet)


def test_what_changes_the_tokens_changes_the_place(small: DataConfig) -> None:
    variants = [
        small,
        with_(small, tokenizer="code8k"),
        with_(small, tokenizer="trained", vocab_size=300),
        with_(small, tokenizer="trained", vocab_size=301),
        with_(small, max_documents=3),
        with_(small, chunks="original"),
        with_(small, chunks="original", seq_len=16),
    ]
    corpora = [prepare(data, quiet) for data in variants]
    assert len({corpus.directory for corpus in corpora}) == len({c.fingerprint for c in corpora}) == len(variants)

    path = next(Path(str(small.path)).rglob("*.txt"))
    path.write_text(path.read_text() + "one more line\n")
    assert prepare(small, quiet).fingerprint != corpora[0].fingerprint


def test_the_same_text_elsewhere_is_the_same_corpus(small: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(str(small.path), tmp_path / "copy")
    copy = prepare(with_(small, path=str(tmp_path / "copy"), cache_dir=str(tmp_path / "other")), quiet)
    ours = prepare(small, quiet)
    assert copy.fingerprint == ours.fingerprint
    assert (copy.directory / "train.bin").read_bytes() == (ours.directory / "train.bin").read_bytes()


def test_two_processes_tokenise_once_and_alike(small: DataConfig, python: Callable, tmp_path: Path) -> None:
    """Started together, in two folders, with two seeds of the string hash."""
    script = f"""
import time
from normfree.config import DataConfig
from normfree.data import packing
whole = packing._write_split
packing._write_split = lambda *arguments: (time.sleep(0.5), whole(*arguments))[1]
corpus = packing.prepare(DataConfig(**{dataclasses.asdict(small)!r}))
print(corpus.fingerprint)
"""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    outputs = [process.communicate(timeout=60) for process in [python("-c", script, cwd=folder) for folder in folders]]
    lines = [output.splitlines() for output, _ in outputs]
    assert all(lines), outputs
    assert sum(line.startswith("Tokenised train") for output in lines for line in output) == 1
    assert sum("waiting" in line for output in lines for line in output) <= 1
    elsewhere = prepare(with_(small, cache_dir=str(tmp_path / "third")), quiet)
    assert lines[0][-1] == lines[1][-1] == elsewhere.fingerprint


def test_the_cache_is_where_the_environment_says(small: DataConfig, tmp_path: Path) -> None:
    corpus = prepare(with_(small, cache_dir=None), quiet)
    assert corpus.directory.is_relative_to(tmp_path / "cache" / "normfree")
    held = {path.name for path in corpus.directory.parent.iterdir()} - {corpus.directory.name}
    assert all(name.endswith(".lock") for name in held)  # nothing temporary is left


# ----------------------------------------------------------------------------------------------------------------------


def test_original_chunks_are_whole_and_of_one_document(small: DataConfig) -> None:
    data = with_(small, chunks="original", seq_len=50, tokenizer="code8k")
    corpus = prepare(data, quiet)
    assert corpus.chunk_len == 50
    for name in corpus.splits:
        expected = []
        for ids in corpus.tokenizer.encode_batch(texts(data, name)):
            expected += [ids[i : i + 50] for i in range(0, len(ids), 50) if i + 50 <= len(ids)]
        tokens = corpus.tokens(name)
        np.testing.assert_array_equal(tokens, np.concatenate(expected))
        assert corpus.tokenizer.end_of_text not in tokens
        decoded = len(corpus.tokenizer.decode(tokens).encode())
        assert corpus.bytes_per_token(name) == pytest.approx(decoded / len(tokens), rel=0.02)
    rows = Batches(corpus.tokens("train"), 50, 4, seed=1, chunk_len=corpus.chunk_len).rows(0)
    assert rows.shape == (4, 51)
    assert prepare(small, quiet).chunk_len is None


def test_trained_sees_the_training_split_only(small: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train_bpe = bpe.train_bpe

    def spy(texts: list[str], vocab_size: int) -> dict[bytes, int]:
        seen.extend(texts)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(bpe, "train_bpe", spy)
    data = with_(small, tokenizer="trained", vocab_size=300)
    corpus = prepare(data, quiet)
    assert seen == texts(data, "train")
    assert corpus.tokenizer.n_vocab == 300


def test_a_vocabulary_that_the_text_cannot_fill_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join("ab" * (i % 5) + "\n" for i in range(2000)))
    said: list[str] = []
    data = DataConfig(source="files", path=str(path), tokenizer="trained", seq_len=4, cache_dir=str(tmp_path / "made"))
    assert prepare(data, said.append).tokenizer.n_vocab < 8192
    assert any("of data.vocab_size=8192" in line for line in said)


# ----------------------------------------------------------------------------------------------------------------------


def damage_bin(folder: Path) -> None:
    file = folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])


def damage_ranks(folder: Path) -> None:
    file = folder / "tokenizer" / "ranks.tiktoken"
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        damage_bin,
        damage_ranks,
        lambda folder: (folder / "val.bin").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
    ],
)
def test_a_damaged_cache_says_what_to_delete(small: DataConfig, damage: Callable[[Path], None]) -> None:
    data = with_(small, tokenizer="code8k")
    corpus = prepare(data, quiet)
    damage(corpus.directory)
    with pytest.raises(UserError, match="damaged") as caught:
        prepare(data, quiet)
    assert f"Delete {corpus.directory} " in str(caught.value)
    assert caught.value.exit_code == EXIT_DATA
    shutil.rmtree(corpus.directory)
    assert prepare(data, quiet).fingerprint == corpus.fingerprint


def test_another_corpus_than_the_one_asked_for_is_refused(small: DataConfig) -> None:
    fingerprint = prepare(small, quiet).fingerprint
    assert prepare(with_(small, fingerprint=fingerprint), quiet).fingerprint == fingerprint
    with pytest.raises(UserError, match=f"data.fingerprint=0123, but the corpus is {fingerprint}"):
        prepare(with_(small, fingerprint="0123"), quiet)


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "text", packages=1)
    data = DataConfig(source="files", path=str(root), seq_len=16, cache_dir=str(tmp_path / "made"))
    corpus = prepare(data, quiet)
    for call in (corpus.tokens, corpus.bytes_per_token):
        with pytest.raises(UserError, match="no split 'val_package'; it has train, val"):
            call("val_package")


def test_held_out_packages_too_short_for_a_block_are_no_split(small: DataConfig) -> None:
    corpus = prepare(small, quiet)
    longest = len(corpus.tokens("val_package"))
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    manifest["splits"]["val_package"] |= {"tokens": 10, "sha256": hashlib.sha256(b"\0" * 20).hexdigest()}
    (corpus.directory / "manifest.json").write_text(json.dumps(manifest))
    (corpus.directory / "val_package.bin").write_bytes(b"\0" * 20)
    assert longest > 32
    assert prepare(small, quiet).splits == ("train", "val")


def test_a_block_longer_than_the_corpus_is_refused_warm_too(small: DataConfig) -> None:
    prepare(small, quiet)
    with pytest.raises(UserError, match=r"data\.seq_len=1000000: a block needs 1000001 tokens, and train has \d+"):
        prepare(with_(small, seq_len=10**6), quiet)


def test_work_that_fails_leaves_nothing(small: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "save_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(small, quiet)
    assert not Path(str(small.cache_dir)).exists()


def test_a_full_disk_is_a_message(small: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "save_tokenizer", fail)
    with pytest.raises(UserError, match=r"data\.cache_dir: writing to .* failed .*No space left"):
        prepare(small, quiet)
    assert not Path(str(small.cache_dir)).exists()


def test_what_a_killed_process_left_is_replaced(small: DataConfig) -> None:
    corpus = prepare(small, quiet)
    shutil.move(corpus.directory, corpus.directory.with_suffix(".tmp"))
    damage_bin(corpus.directory.with_suffix(".tmp"))
    assert prepare(small, quiet).fingerprint == corpus.fingerprint
    assert not corpus.directory.with_suffix(".tmp").exists()


def test_a_cache_that_cannot_be_made_is_a_message(small: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .* cannot be written") as caught:
        prepare(with_(small, cache_dir=str(tmp_path / "file")), quiet)
    assert caught.value.exit_code == EXIT_DATA


def test_documents_are_read_as_they_are(tmp_path: Path) -> None:
    """Carriage returns and a missing last line end survive; so does the string of end-of-text."""
    path = tmp_path / "a.txt"
    path.write_bytes("".join(f"{i} {END_OF_TEXT}\r\n" for i in range(3000)).encode() + b"end")
    data = DataConfig(source="files", path=str(path), seq_len=8, cache_dir=str(tmp_path / "made"))
    corpus = prepare(data, quiet)
    parts = [corpus.tokenizer.decode(corpus.tokens(name)[:-1]) for name in ("train", "val")]
    assert "".join(parts).encode() == path.read_bytes()
    assert (corpus.tokens("train") == corpus.tokenizer.end_of_text).sum() == 1
    assert isinstance(next(Files(data).documents("train")), Document)


def test_folders_that_look_alike_are_two_texts(tmp_path):
    """Equal names, sizes and modification times, as archives and images make them: the second was never read."""
    texts = {}
    for name, letter in (("one", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "t.txt"
        path.write_text("".join(f"{letter * 4} {n}\n" for n in range(3000, 6000)))
        os.utime(path, (0, 0))
        texts[name] = DataConfig(
            source="files", path=str(tmp_path / name), tokenizer="bytes", seq_len=16, cache_dir=str(tmp_path / "cache")
        )
    one, other = (prepare(data, report=lambda line: None) for data in texts.values())
    assert one.fingerprint != other.fingerprint
    assert prepare(texts["one"], report=lambda line: None).fingerprint == one.fingerprint
    path = tmp_path / "one" / "t.txt"
    path.write_text(path.read_text().replace("a", "c"))  # in place, of the same size, and its time put back
    os.utime(path, (0, 0))
    assert prepare(texts["one"], report=lambda line: None).fingerprint not in (one.fingerprint, other.fingerprint)


def test_who_waits_for_a_process_that_fails_takes_its_place(tmp_path):
    """The one that fails takes the folders along that it had made."""
    folder = tmp_path / "cache" / "corpora" / "x"
    reports, began = [], threading.Event()

    def fail():
        with contextlib.suppress(ValueError), alone(folder, reports.append):
            began.set()
            time.sleep(1.5)  # longer than the other one tries before it says that it waits
            raise ValueError

    thread = threading.Thread(target=fail)
    thread.start()
    began.wait()
    with alone(folder, reports.append) as temporary:
        thread.join()
        assert temporary.parent == folder.parent
        assert folder.parent.is_dir()
    assert reports == ["Another process is preparing this corpus; waiting for it."]

"""Text and token files: what is wrong with them is found before the first step, and said with file and place."""

import gzip
import io
import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from normfree.cli import run_config
from normfree.config import Config, DataConfig
from normfree.data import packing
from normfree.data.packing import prepare
from normfree.data.readers import read_texts
from normfree.data.shards import SPLITS
from normfree.errors import EXIT_DATA, UserError
from normfree.training.loop import Trainer

FUZZ = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
GOOD = "".join(f"line {i} of a text that is long enough\n" for i in range(60)).encode()


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch):
    """`refused(path)`: what the run is refused with, before its first step."""

    def step(*args: object) -> None:
        raise AssertionError("a step began")

    def go(path: object) -> str:
        monkeypatch.setattr(Trainer, "train_step", step)
        with pytest.raises(UserError) as caught:
            run_config(settings_for(tiny, tmp_path, path))
        assert caught.value.exit_code == EXIT_DATA
        return str(caught.value)

    return go


def settings_for(tiny, tmp_path: Path, path: object) -> Config:
    where = {"run_dir": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache")}
    return tiny(**where, **{"data.path": str(path), "data.seq_len": 8, "train.max_steps": 1})


# -- S14: the user's text ---------------------------------------------------------------------------------------------

ROW = json.dumps({"content": "x"}).encode()
BAD_TEXTS = {
    "empty": ("a.txt", b"", ["a.txt is empty"]),
    "not UTF-8": ("a.txt", GOOD + b"caf\xe9\n", ["a.txt is not UTF-8", f"0xe9 at offset {len(GOOD) + 3}"]),
    "UTF-16": ("a.txt", "abc".encode("utf-16"), ["a.txt is not UTF-8", "offset 0"]),
    "too short": ("a.txt", b"ab", ["data.seq_len=8", "a block needs 9 tokens"]),
    "half a gzip": ("a.json.gz", gzip.compress(ROW * 99)[:-9], ["a.json.gz is not a whole gzip"]),
    "odd row": ("a.jsonl", ROW + b"\n{", ["a.jsonl line 2 is not JSON"]),
    "deep row": ("a.jsonl", ROW + b"\n" + b"[" * 100_000, ["a.jsonl line 2 is not JSON"]),
    "long number": ("a.jsonl", b'{"content": ' + b"9" * 5000 + b"}", ["a.jsonl line 1 is not JSON"]),
    "no text": ("a.jsonl", b'{"content": null}', ["a.jsonl line 1", "is no text"]),
    "no parquet": ("a.parquet", ROW, ["a.parquet is not a readable parquet"]),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_named_before_the_first_step(refused, tmp_path, name):
    file, content, says = BAD_TEXTS[name]
    (tmp_path / file).write_bytes(content)
    said = refused(file)
    for word in says:
        assert word in said
    assert [path.name for path in tmp_path.iterdir()] == [file], "no run, no cache"


@pytest.mark.parametrize(
    "path", ["gone.txt", "gone/*.txt", "~nobody_here/x", ".", "/proc/self/mem", "x" * 150 + ".txt"]
)
def test_a_text_that_is_not_there_is_said(refused, tmp_path, path):
    assert "data.path" in refused(path)
    assert not list(tmp_path.iterdir())


# -- S14: token files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i}.txt").write_bytes(b"".join(b"%d %d\n" % (i, i * j) for j in range(40)))
    return folder


@pytest.fixture(scope="module")
def made(texts):
    """A cache with one corpus."""
    cache = texts / "cache"
    prepare(DataConfig(source="files", path=str(texts), tokenizer="bytes", seq_len=8, cache_dir=str(cache)), str)
    return cache


@pytest.fixture
def corpus(made, tmp_path):
    """A copy of it where the command will look."""
    shutil.copytree(made, tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache" / "corpora").iterdir() if path.is_dir())
    return folder


def put_id(folder: Path, value: int, dtype: str = "uint16") -> None:
    ids = np.memmap(folder / "train.bin", dtype=dtype, mode="r+")
    ids[77] = value
    ids.flush()


def in_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path, size: int) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-size])


BAD_SHARDS = {
    "an id that is none": (lambda f: put_id(f, 257), ["train.bin has id 257 at offset 154", "257 ids"]),
    "the largest id": (lambda f: put_id(f, 65535), ["train.bin has id 65535 at offset 154"]),
    "another id": (lambda f: put_id(f, 1), ["train.bin is not what was written: sha256"]),
    "odd bytes": (lambda f: cut(f, 1), ["train.bin has ", "no multiple of 2", "ends at offset"]),
    "half": (lambda f: cut(f, 2000), ["train.bin has ", "ends at offset"]),
    "empty": (lambda f: (f / "val.bin").write_bytes(b""), ["val.bin has 0 bytes"]),
    "missing": (lambda f: (f / "val.bin").unlink(), ["val.bin"]),
    "no manifest": (lambda f: (f / "manifest.json").write_text("[1]"), ["manifest.json is not what was written"]),
    "a deep manifest": (lambda f: (f / "manifest.json").write_text("[" * 99_999), ["damaged", "recursion"]),
    "objects": (lambda f: in_manifest(f, dtype="O"), ["ids of type 'O'"]),
    "a path": (lambda f: in_manifest(f, splits={"train": {}, "val": {}, "../../x": {}}), ["'../../x'"]),
    "another vocabulary": (lambda f: in_manifest(f, tokenizer={"n_vocab": 9}), ["has 257 ids, not 9"]),
    "counts": (lambda f: in_manifest(f, splits={"train": {"tokens": "1"}, "val": {}}), ["manifest.json"]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["tokenizer"]),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_bad_token_file_is_named_before_the_first_step(refused, corpus, texts, tmp_path, name):
    damage, says = BAD_SHARDS[name]
    damage(corpus)
    said = refused(texts)
    for word in ["the cached corpus is damaged", str(corpus), *says]:
        assert word in said
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "no run"


def test_a_look_at_sizes_alone_is_caught(tiny, corpus, texts, tmp_path, monkeypatch):
    """The control: who believes the files meets the bad id in the middle of a step, as an error without a name."""
    monkeypatch.setattr(packing, "check_ids", lambda *args: None)
    ids = np.memmap(corpus / "train.bin", dtype="uint16", mode="r+")
    ids[:] = 60_000
    ids.flush()
    with pytest.raises(IndexError):
        run_config(settings_for(tiny, tmp_path, texts))
    assert (tmp_path / "run").exists()


# -- P4: any bytes ----------------------------------------------------------------------------------------------------


def a_parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"content": f"text {i}" * 9} for i in range(30)]), sink)
    return sink.getvalue()


WHOLE = {".txt": GOOD, ".py": GOOD, ".jsonl": (ROW + b"\n") * 9, ".json.gz": gzip.compress((ROW + b"\n") * 9)}
WHOLE[".parquet"] = a_parquet()


@st.composite
def contents(draw: st.DrawFn) -> tuple[str, bytes]:
    """A kind of file, and bytes: any, or good ones with some changed, cut or repeated."""
    kind = draw(st.sampled_from(sorted(WHOLE)))
    if draw(st.booleans()):
        return kind, draw(st.binary(max_size=200))
    content = bytearray(WHOLE[kind])
    for place in draw(st.lists(st.floats(0, 1, exclude_max=True), max_size=6)):
        content[int(place * len(content))] = draw(st.integers(0, 255))
    keep = draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.0]))
    return kind, bytes(content[: int(keep * len(content))]) * draw(st.sampled_from([1, 1, 2]))


@settings(max_examples=300, **FUZZ)
@given(file=contents())
def test_any_bytes_are_texts_or_an_error_that_names_the_file(tmp_path, file):
    kind, content = file
    path = tmp_path / f"any{kind}"
    path.write_bytes(content)
    start = time.monotonic()
    try:
        texts = [text for text, _ in read_texts(path, "content")]
    except UserError as error:
        said = str(error)
    else:
        said = str(path)
        for text in texts:
            text.encode()
    assert str(path) in said
    assert time.monotonic() - start < 5


@settings(max_examples=25, **FUZZ)
@given(file=contents())
def test_any_bytes_are_a_corpus_or_an_error(tmp_path, file):
    kind, content = file
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / f"any{kind}").write_bytes(content)
    data = DataConfig(source="files", path=str(tmp_path / "any"), tokenizer="bytes", seq_len=4)
    data.cache_dir = str(tmp_path / "any" / "cache")
    with suppress(UserError):
        found = prepare(data, str)
        assert all(found.tokens(name).max() < found.tokenizer.n_vocab for name in found.splits)


@settings(max_examples=60, **FUZZ)
@given(
    name=st.sampled_from([*(f"{split}.bin" for split in SPLITS[:2]), "manifest.json", "tokenizer/tokenizer_meta.json"]),
    junk=st.binary(min_size=1, max_size=12),
    place=st.floats(0, 1, exclude_max=True),
    over=st.booleans(),
)
def test_any_change_of_a_corpus_is_noticed_or_means_nothing(made, texts, name, junk, place, over):
    """Bytes written over some, or put between."""
    data = DataConfig(source="files", path=str(texts), tokenizer="bytes", seq_len=8, cache_dir=str(made))
    (folder,) = (path for path in (made / "corpora").iterdir() if path.is_dir())
    whole = prepare(data, str)
    before = (folder / name).read_bytes()
    at = int(place * len(before))
    changed = before[:at] + junk + before[at + (len(junk) if over else 0) :]
    (folder / name).write_bytes(changed)
    try:
        found = prepare(data, str)
    except UserError as error:
        said = str(error)
    else:
        said = str(folder)
        assert changed == before or name.endswith(".json")
        for split in whole.splits:
            np.testing.assert_array_equal(found.tokens(split), whole.tokens(split))
    finally:
        (folder / name).write_bytes(before)
    assert str(folder) in said

"""Tokenizers: exact on any text where they say so, the same ids everywhere, one message for what is wrong."""

import hashlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.config import DataConfig
from normfree.data import bpe, network, tokenizer
from normfree.data.packing import Corpus, prepare
from normfree.data.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    JsonTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from normfree.errors import EXIT_DATA, UserError

NASTY = [
    "",
    "\0",
    "a\0b",
    END_OF_TEXT,
    f"x{END_OF_TEXT}{END_OF_TEXT} y",
    "\r\n\t \n\n",
    "  def f(x):\n\treturn x  \n",
    "e\u0301 é ﬁ ß İ",
    "日本語 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ufeff\ufffd",
    "don't we'LL 1234567890 ½",
]


def build(name: str, **settings: object) -> Tokenizer:
    texts = ["def train(model, batches):\n    return model\n" * 5, "naïve café 日本"]
    return build_tokenizer(DataConfig(tokenizer=name, **settings), lambda: texts)  # type: ignore[arg-type]


BUILT_IN = {name: build(name, vocab_size=300) for name in ("bytes", "code8k", "trained")}


@pytest.fixture(params=BUILT_IN)
def built_in(request: pytest.FixtureRequest) -> Tokenizer:
    return BUILT_IN[request.param]


def json_tokenizer(path: Path, *, lossy: bool = False, end: str = END_OF_TEXT, words: int = 0) -> Path:
    """A small byte-level tokenizer.json; one that forgets capitals; or one of very many words."""
    if words:
        made = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({f"w{i}": i for i in range(words)} | {end: words}, unk_token=end)
        )
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    else:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens([end])
    if lossy:
        made.normalizer = tokenizers.normalizers.Lowercase()
    made.enable_truncation(4)
    made.enable_padding(length=10)
    made.save(str(path))
    return path


# ----------------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.text(), max_size=5))
def test_built_in_tokenizers_give_any_unicode_back(texts: list[str]) -> None:
    for one in BUILT_IN.values():
        assert one.lossless
        encoded = one.encode_batch(texts)
        assert [one.decode(ids) for ids in encoded] == texts
        assert all(ids.max(initial=0) < one.n_vocab for ids in encoded)


def test_built_in_tokenizers_give_hard_strings_back(built_in: Tokenizer) -> None:
    assert [built_in.decode(ids) for ids in built_in.encode_batch(NASTY)] == NASTY


def test_special_strings_are_ordinary_text(built_in: Tokenizer) -> None:
    (ids,) = built_in.encode_batch([f"a{END_OF_TEXT}b"])
    assert built_in.end_of_text not in ids
    assert built_in.decode([built_in.end_of_text]) == END_OF_TEXT


def test_a_cut_character_is_replaced_and_not_an_error() -> None:
    ids = BUILT_IN["bytes"].encode_batch(["é"])[0]
    assert BUILT_IN["bytes"].decode(ids[:1]) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(built_in: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lone surrogate \(U\+D800\) at character 2"):
        built_in.encode_batch(["ok", "ab\ud800"])


def test_very_long_white_space_is_encoded() -> None:
    """tiktoken's pattern overflows its stack on such a run; in the midst of other text, too."""
    text = "x" + " \n" * 600_000 + "y"
    (ids,) = BUILT_IN["code8k"].encode_batch([text])
    assert BUILT_IN["code8k"].decode(ids) == text


def test_code8k_has_8192_ids(stdlib: Corpus) -> None:
    one = BUILT_IN["code8k"]
    assert (one.n_vocab, one.end_of_text) == (8192, 8191)
    assert one.fingerprint == stdlib.tokenizer.fingerprint
    assert stdlib.bytes_per_token("val") > 3.5  # it was made for this text; GPT-2's has 2.1
    ranks = bpe.parse_ranks(one.files()["ranks.tiktoken"])
    assert bpe.parse_ranks(bpe.format_ranks(ranks)) == ranks


def test_code8k_command_gives_the_same_file_again(python: Callable, tmp_path: Path) -> None:
    command = Path(__file__).parents[2] / "experiments" / "train_code8k.py"
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "ranks.tiktoken"
        runs.append((out, python(str(command), "--out", str(out), "--max-documents", "8", cwd=tmp_path / name)))
    for out, process in runs:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert hashlib.sha256(out.read_bytes()).hexdigest() in output
    assert runs[0][0].read_bytes() == runs[1][0].read_bytes()


def test_ranks_mean_what_the_training_library_means() -> None:
    """The same text gets the same tokens from tiktoken and from the library that learnt the merges."""
    text = Path(tokenizer.__file__).read_text() + "".join(NASTY)
    ranks = bpe.train_bpe([text], 700)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        ),
    )
    assert BpeTokenizer("ours", ranks).encode_batch([text])[0].tolist() == theirs.encode(text).ids


def test_trained_has_the_vocabulary_that_was_asked_for() -> None:
    texts = [Path(tokenizer.__file__).read_text()]
    one = build_tokenizer(DataConfig(tokenizer="trained", vocab_size=400), lambda: texts)
    assert (one.n_vocab, one.end_of_text) == (400, 399)
    smallest = build_tokenizer(DataConfig(tokenizer="trained", vocab_size=257), lambda: texts)
    assert smallest.n_vocab == 257
    assert len(smallest.encode_batch(["é!"])[0]) == 3


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "code8k", "trained", "json"])
def test_a_saved_tokenizer_is_the_same_one(name: str, tmp_path: Path) -> None:
    one = build(str(json_tokenizer(tmp_path / "tokenizer.json"))) if name == "json" else BUILT_IN[name]
    save_tokenizer(one, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for attribute in ("kind", "name", "n_vocab", "end_of_text", "fingerprint", "lossless"):
        assert getattr(again, attribute) == getattr(one, attribute)
    for ours, theirs in zip(one.encode_batch(NASTY), again.encode_batch(NASTY), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_changed_tokenizer_is_noticed(tmp_path: Path) -> None:
    save_tokenizer(BUILT_IN["trained"], tmp_path)
    file = tmp_path / "ranks.tiktoken"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    swapped = [
        line.replace(b" 257\n", b" x\n").replace(b" 258\n", b" 257\n").replace(b" x\n", b" 258\n") for line in lines
    ]
    for damaged in (b"".join(swapped), b"".join(lines[:-1]), whole[:-9], b"", b"?" + whole):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read") as caught:
            load_tokenizer(tmp_path)
        assert caught.value.exit_code == EXIT_DATA
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "nothing")


# ----------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_file_is_read_as_plain_text(tmp_path: Path) -> None:
    """Special tokens, truncation and padding of the file do not touch the corpus."""
    one = build(str(json_tokenizer(tmp_path / "tokenizer.json")))
    assert one.lossless
    (ids,) = one.encode_batch([f"longer than four tokens {END_OF_TEXT}"])
    assert one.end_of_text not in ids
    assert one.decode(ids) == f"longer than four tokens {END_OF_TEXT}"
    assert one.n_vocab == 257
    assert build(str(tmp_path)).fingerprint == one.fingerprint  # the folder will do


@pytest.mark.parametrize("lossy", [False, True])
def test_a_tokenizer_file_says_whether_it_is_lossless(lossy: bool, small: DataConfig, tmp_path: Path) -> None:
    small.tokenizer = str(json_tokenizer(tmp_path / "tokenizer.json", lossy=lossy))
    for _ in ("cold", "warm"):
        said: list[str] = []
        corpus = prepare(small, said.append)
        assert corpus.tokenizer.lossless is not lossy
        assert any(("is not lossless" if lossy else "is lossless") in line for line in said)
        assert corpus.manifest["tokenizer"]["lossless"] is not lossy


def test_large_vocabularies_take_four_bytes(small: DataConfig, tmp_path: Path) -> None:
    small.tokenizer = str(json_tokenizer(tmp_path / "tokenizer.json", words=70_000))
    corpus = prepare(small, lambda _: None)
    assert corpus.tokens("train").dtype == np.uint32
    assert corpus.tokens("train").max() == 70_000


def test_broken_tokenizer_files_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    for content in (b"", b"{", b"[]", json.dumps({"model": {"type": "none"}}).encode(), b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"data\.tokenizer: broken\.json is not a tokenizer\.json") as caught:
            build(str(path))
        assert caught.value.exit_code == EXIT_DATA
    with pytest.raises(UserError, match="no end-of-text token"):
        JsonTokenizer("x", json_tokenizer(tmp_path / "t.json", end="<pad>").read_bytes())


def test_an_unknown_tokenizer_lists_the_choices(small: DataConfig) -> None:
    small.tokenizer = "code8"
    with pytest.raises(
        UserError, match=r"unknown data\.tokenizer 'code8'.*Did you mean 'code8k'.*bytes.*gpt2"
    ) as caught:
        prepare(small)
    assert caught.value.exit_code == EXIT_DATA
    assert not Path(str(small.cache_dir)).exists()


# ----------------------------------------------------------------------------------------------------------------------


def test_gpt2_without_a_network_says_what_to_do(small: DataConfig) -> None:
    small.tokenizer = "gpt2"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"gpt2.*code8k.*TIKTOKEN_CACHE_DIR.*tokenizer\.json") as caught:
        prepare(small)
    assert time.monotonic() - began < 4
    assert caught.value.exit_code == EXIT_DATA
    assert not Path(str(small.cache_dir)).exists()


def test_damaged_gpt2_files_do_not_count_as_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tiktoken would delete them and wait for the network without a limit."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for url in tokenizer.GPT2_FILES:
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_text("half a downl")
    with pytest.raises(UserError, match="cannot be reached"):
        build("gpt2")


def test_gpt2_reads_the_cache_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its files there, no network is asked; its ids are the BPE's, end-of-text the last."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(tokenizer, "_gpt2_is_here", lambda: True)
    ranks = bpe.parse_ranks(BUILT_IN["trained"].files()["ranks.tiktoken"])
    monkeypatch.setattr(openai_public, "gpt2", lambda: {"mergeable_ranks": ranks})
    one = build("gpt2")
    assert (one.name, one.end_of_text) == ("gpt2", len(ranks))


def test_a_silent_server_costs_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped packets look like a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert not network.reachable("https://example.invalid", seconds=0.5)
        assert 0.4 < time.monotonic() - began < 2
    assert network.SECONDS <= 3


def test_bytes_are_counted_where_a_character_is_cut(built_in: Tokenizer) -> None:
    """A cut character has bytes, and no text."""
    text = "caf\u00e9 \u65e5\u672c\n" * 3
    ids = built_in.encode_batch([text])[0]
    for cut in range(len(ids)):
        assert built_in.n_bytes(ids[:cut]) + built_in.n_bytes(ids[cut:]) == len(text.encode())


def test_a_tokenizer_that_cannot_encode_every_text_is_a_message(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    words = tokenizers.models.WordLevel({"hello": 0, "</s>": 1}, unk_token=None)
    tokenizers.Tokenizer(words).save(str(path))
    with pytest.raises(UserError, match="cannot encode every text: .*UNK") as caught:
        build(str(path))
    assert caught.value.exit_code == EXIT_DATA

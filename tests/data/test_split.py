"""What is held out is new: no near-duplicates, no shared windows to speak of, whole packages apart."""

import random
from collections.abc import Iterable

import numpy as np
import pytest

from normfree.data.packing import Corpus
from normfree.data.sources import Document
from normfree.data.split import Split, line_windows, split_documents
from normfree.data.tokenizer import END_OF_TEXT


def lines(seed: int, n: int = 50) -> list[str]:
    """Lines that no other seed has."""
    return [f"line {i} of text {seed}: {(seed * 7919 + i) * 104729}" for i in range(n)]


def document(seed: int, n: int = 50, package: str | None = None) -> Document:
    return Document("\n".join(lines(seed, n)), package, f"{seed}.txt")


def texts(split: Split, name: str) -> list[str]:
    return [document.text for document in split.documents.get(name, [])]


def everything(split: Split) -> list[str]:
    return [text for name in split.documents for text in texts(split, name)]


def windows(texts: Iterable[str]) -> list[tuple[str, ...]]:
    """The definition, a second time and without hashes: every five lines in a row, stripped, blank ones left out."""
    found = []
    for text in texts:
        stripped = [line.strip() for line in text.split("\n") if line.strip()]
        width = min(5, len(stripped))
        found += [tuple(stripped[i : i + width]) for i in range(len(stripped) - width + 1) if width]
    return found


def share_in(held_out: Iterable[str], train: Iterable[str]) -> float:
    known = set(windows(train))
    return float(np.mean([window in known for window in windows(held_out)]))


def test_window_hashes_are_equal_where_the_windows_are() -> None:
    samples = ["a\nb\nc\nd\ne\nf", "  a\n\nb\nc \n\td\ne\n", "a\nb", "", "\n \n", "b\na", "f\ne\nd\nc\nb\na"]
    ours = [int(h) for text in samples for h in line_windows(text)]
    theirs = windows(samples)
    assert len(ours) == len(theirs)
    assert len(set(ours)) == len(set(theirs)) == len(set(zip(ours, theirs, strict=True)))


def test_near_duplicates_are_removed() -> None:
    documents = [document(seed) for seed in range(30)]
    copied = lines(3)
    copied[10] = "one line was changed"
    planted = [
        Document("\n".join(copied), None, "changed"),
        Document("\n\n".join(f"    {line}" for line in lines(4)), None, "indented"),
        Document("\n".join(lines(5)[:40]), None, "shortened"),
        Document("\n".join(lines(6)), None, "the same"),
    ]
    quoting = Document("\n".join(lines(7)[:15] + lines(99)), None, "quotes a quarter")
    split = split_documents([*documents, *planted, quoting])
    assert split.near_duplicates == 4
    kept = everything(split)
    assert quoting.text in kept
    for seed, plant in zip((3, 4, 5, 6), planted, strict=True):
        assert (documents[seed].text in kept) + (plant.text in kept) == 1 + (plant.text == documents[seed].text)
    assert split.near_duplicate_bytes > 0


def test_splits_have_no_document_in_common() -> None:
    split = split_documents([document(seed, package=f"p{seed % 20}") for seed in range(100)])
    assert set(split.documents) == {"train", "val", "val_package"}
    assert len(everything(split)) == len(set(everything(split))) == 100


def test_shared_passages_stay_out_of_what_is_held_out() -> None:
    """Sixty of a hundred documents quote one of ten passages: a division by chance would leak many windows."""
    passages = [lines(1000 + i, 12) for i in range(10)]
    documents = [
        Document("\n".join(lines(seed) + (passages[seed % 10] if seed < 60 else [])), f"p{seed % 7}", str(seed))
        for seed in range(100)
    ]
    chance = random.Random(0).sample(range(100), 10)
    leak = share_in([documents[i].text for i in chance], [documents[i].text for i in range(100) if i not in chance])
    assert leak > 0.05

    split = split_documents(documents)
    for name in ("val", "val_package"):
        measured = share_in(texts(split, name), texts(split, "train"))
        assert measured <= 0.01
        assert split.overlap[name] == pytest.approx(measured)


def test_order_and_place_of_the_files_decide_nothing() -> None:
    documents = [document(seed, package=f"p{seed % 9}") for seed in range(60)]
    moved = [Document(d.text, d.package, f"/elsewhere/{d.label}") for d in documents]
    random.Random(1).shuffle(moved)
    one, other = split_documents(documents), split_documents(moved)
    assert {name: texts(one, name) for name in one.documents} == {name: texts(other, name) for name in other.documents}
    assert one.packages == other.packages


def test_a_package_is_held_out_whole() -> None:
    split = split_documents([document(seed, package=f"p{seed % 20}") for seed in range(200)])
    held = {d.package for d in split.documents["val_package"]}
    assert held
    assert held == set(split.packages)
    for name in ("train", "val"):
        assert not held & {d.package for d in split.documents[name]}


@pytest.mark.parametrize("packages", [[None], ["only"], ["half", "other"]])
def test_a_package_that_is_much_of_the_text_is_not_held_out(packages: list[str | None]) -> None:
    split = split_documents([document(seed, package=packages[seed % len(packages)]) for seed in range(60)])
    assert set(split.documents) == {"train", "val"}


def test_a_single_text_is_held_out_at_its_end() -> None:
    whole = document(1, n=2000)
    split = split_documents([whole])
    (train,), (val,) = texts(split, "train"), texts(split, "val")
    assert train + val == whole.text
    assert val.startswith("line ")
    assert 0.04 < len(val) / len(whole.text) < 0.2
    assert split.cut == whole.label
    assert split.overlap["val"] == 0


def test_a_text_without_lines_is_held_out_at_its_end() -> None:
    split = split_documents([Document("word " * 10_000, None, "one line")])
    assert texts(split, "train")[0] + texts(split, "val")[0] == "word " * 10_000


def test_max_documents_limits_each_split() -> None:
    split = split_documents([document(seed, package=f"p{seed % 20}") for seed in range(200)], max_documents=3)
    assert {name: len(list(part)) for name, part in split.documents.items()} == {"train": 3, "val": 3, "val_package": 3}


def test_blank_documents_are_left_out() -> None:
    split = split_documents([document(seed) for seed in range(30)] + [Document(" \n\t\n", None, "blank")])
    assert split.blank == 1
    assert " \n\t\n" not in everything(split)
    assert split_documents([Document("\n", None, "blank")]).documents == {}


def test_the_default_corpus_is_divided_as_promised(stdlib: Corpus) -> None:
    """Counted from the tokens on disk, with nothing of the code that divided them."""
    found = {name: stdlib.tokenizer.decode(stdlib.tokens(name)).split(END_OF_TEXT)[:-1] for name in stdlib.splits}
    assert set(found) == {"train", "val", "val_package"}
    for name in ("val", "val_package"):
        share = share_in(found[name], found["train"])
        assert share <= 0.01
        assert stdlib.manifest["splits"][name]["window_overlap"] == pytest.approx(share, abs=1e-9)
        assert 0.02 < stdlib.manifest["splits"][name]["bytes"] / stdlib.manifest["splits"]["train"]["bytes"] < 0.12
    assert not set(found["train"]) & set(found["val"])

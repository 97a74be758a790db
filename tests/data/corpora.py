"""Small corpora for the tests of this folder."""

from pathlib import Path


def quiet(message: str) -> None:
    """A report that nobody reads."""


def write_corpus(root: Path, documents: int = 40, packages: int = 4, lines: int = 60) -> Path:
    """Folders of .txt files, no two lines of which are the same."""
    for number in range(documents):
        folder = root / f"package{number % packages}"
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"text {number} says {number * 7919 + line * 104729} in line {line}\n" for line in range(lines))
        (folder / f"{number}.txt").write_text(text)
    return root

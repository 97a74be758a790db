"""Where text comes from. A source yields documents; it knows nothing of tokens, splits or the cache."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from normfree.config import DataConfig
from normfree.data import network, readers
from normfree.errors import EXIT_DATA, UserError

CODEPARROT = {  # split: (dataset on the Hub, its split, names of local files)
    "train": ("huggingface-course/codeparrot-ds-train", "train", "train*"),
    "val": ("huggingface-course/codeparrot-ds-valid", "validation", "valid*"),
}
SHUFFLE_SEED = 0
SHUFFLE_BUFFER = 10_000  # documents
SMALLEST = 64  # bytes: shorter source files are empty packages and stubs
NOT_CORPUS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `package` is the unit that is held out whole, `label` names the document in errors."""

    text: str
    package: str | None
    label: str


class Source(Protocol):
    """What packing asks of a source. It is built from the settings, and nothing is read until a method is called."""

    name: str
    licence: str
    own_splits: bool  # it comes divided in train and val; else packing removes near-duplicates and divides it

    def identity(self) -> str:
        """Changes when the text may have changed; cheap (file sizes and times, not contents)."""

    def check(self) -> None:
        """Raise UserError for what can be found wrong without reading everything."""

    def documents(self, split: str) -> Iterator[Document]:
        """All documents of `split` ("train" or "val"); a source without own splits has all of them in "train"."""


def stat_identity(files: Iterable[tuple[Path, str]]) -> str:
    """sha256 over place, name, size and times of (path, name) pairs.

    The place and the time of the inode's change tell files apart whose modification times were set to be equal, as
    those of archives often are: the text of another folder must never be taken for this one.
    """
    digest = hashlib.sha256()
    for path, name in files:
        status = path.stat()
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
        digest.update(os.fsencode(f"{path.absolute()}\0{name}\0{status.st_size}\0{times}\n"))
    return digest.hexdigest()


class _Base:
    own_splits = False
    name: str
    licence: str

    def __init__(self, data: DataConfig) -> None:
        self.data = data


class _PythonFiles(_Base):
    """All Python source under some folders. The top-level module or package is the unit that is held out."""

    _listed: list[tuple[Path, str]] | None = None

    def _roots(self) -> list[Path]:
        raise NotImplementedError

    def _skip(self, folder: str) -> bool:
        return folder == "__pycache__"

    def _files(self) -> list[tuple[Path, str]]:
        """(path, name below its root) of every .py file, in a fixed order."""
        if self._listed is None:
            self._listed = sorted(self._walk(), key=lambda pair: (pair[1], pair[0]))
        return self._listed

    def _walk(self) -> Iterator[tuple[Path, str]]:
        for root in self._roots():
            for folder, subfolders, names in os.walk(root):
                subfolders[:] = [name for name in subfolders if not self._skip(name)]
                for name in names:
                    path = Path(folder, name)
                    if name.endswith(".py") and path.is_file():
                        yield path, path.relative_to(root).as_posix()

    def identity(self) -> str:
        return stat_identity(self._files())

    def check(self) -> None:
        if not self._files():
            places = ", ".join(map(str, self._roots())) or "any folder"
            raise UserError(
                f"data.source={self.name}: there is no Python source in {places}. Choose data=files and data.path.",
                EXIT_DATA,
            )

    def documents(self, split: str) -> Iterator[Document]:
        for path, name in self._files():
            try:
                content = path.read_bytes()
                text = content.decode()
            except (UnicodeDecodeError, PermissionError):
                continue  # other people's files: a handful are in old encodings, or not for everyone to read
            if len(content) >= SMALLEST:
                yield Document(text, name.split("/")[0].removesuffix(".py"), name)


class PythonStdlib(_PythonFiles):
    """The running interpreter's standard library without its tests: about 11 MB, already on the machine."""

    name = "python_stdlib"
    licence = "PSF-2.0; read from the running interpreter"

    def _roots(self) -> list[Path]:
        return [Path(sysconfig.get_paths()["stdlib"])]

    def _skip(self, folder: str) -> bool:
        return folder in NOT_CORPUS


class PythonEnvironment(_PythonFiles):
    """The source of every installed package: tens to hundreds of MB, already on the machine."""

    name = "python_environment"
    licence = "each package's own, see its metadata; read from the running environment"

    def _roots(self) -> list[Path]:
        paths = dict.fromkeys(Path(entry).resolve() for entry in sys.path if entry)
        return [path for path in paths if path.name in ("site-packages", "dist-packages") and path.is_dir()]


class Files(_Base):
    """The user's own text. The top-level folder a file is in, below `data.path`, is the unit that is held out."""

    name = "files"
    licence = "the user's own"

    def _found(self) -> tuple[list[Path], Path]:
        if not self.data.path:
            raise UserError("data.path is not set; data.source=files needs a file, a folder or a glob.", EXIT_DATA)
        return readers.find_files(self.data.path)

    def identity(self) -> str:
        files, root = self._found()
        pairs = [(path, path.relative_to(root).as_posix()) for path in files]
        return f"{self.data.text_column} {stat_identity(pairs)}"

    def check(self) -> None:
        for path in self._found()[0]:
            readers.check_file(path, self.data.text_column)

    def documents(self, split: str) -> Iterator[Document]:
        files, root = self._found()
        for path in files:
            below = path.relative_to(root).parts
            for text, place in readers.read_texts(path, self.data.text_column):
                yield Document(text, below[0] if len(below) > 1 else None, place)


class CodeParrot(_Base):
    """Python files of GitHub, streamed from the Hub, or from a local copy in `data.path`.

    The local copy is a folder of train*.json.gz and valid*.json.gz (or .jsonl, or .parquet) with the same columns. The
    set comes divided in train and validation: it is neither searched for duplicates nor divided again.
    """

    name = "codeparrot"
    licence = "each file's own, in the set's column `license`"
    own_splits = True

    def _local(self, split: str) -> list[Path]:
        files, _ = readers.find_files(str(Path(self.data.path or "", CODEPARROT[split][2])))
        kinds = {readers.kind_of(path) for path in files}
        if len(kinds) > 1 or kinds & set(readers.PLAIN):
            raise UserError(f"data.path: {', '.join(map(str, files))} should be of one kind, with columns.", EXIT_DATA)
        return files

    def identity(self) -> str:
        if self.data.path is None:
            return f"{self.data.text_column} of {CODEPARROT}"
        pairs = [(path, path.name) for split in CODEPARROT for path in self._local(split)]
        return f"{self.data.text_column} {stat_identity(pairs)}"

    def check(self) -> None:
        if self.data.path is not None:
            for split in CODEPARROT:
                for path in self._local(split):
                    readers.check_file(path, self.data.text_column)
            return
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        offline = any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)
        if offline or not network.reachable(hub):
            why = "HF_HUB_OFFLINE is set" if offline else f"{hub} cannot be reached"
            raise UserError(
                f"data=codeparrot is read from the Hugging Face Hub, and {why}. Either choose data=python_stdlib or "
                "data=python_environment, which need no network, or set data.path to a folder with a copy of the set "
                "(train*.json.gz and valid*.json.gz).",
                EXIT_DATA,
            )

    def documents(self, split: str) -> Iterator[Document]:
        from datasets import load_dataset

        column = self.data.text_column
        try:
            if self.data.path is None:
                name, part, _ = CODEPARROT[split]
                rows = load_dataset(name, split=part, streaming=True)
            else:
                files = self._local(split)
                builder = "parquet" if readers.kind_of(files[0]) == ".parquet" else "json"
                rows = load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)
            # The original shuffled the whole set with this seed and took the first documents. A stream can only be
            # shuffled through a buffer, so the documents are others, drawn from the beginning of shuffled shards.
            rows = rows.shuffle(seed=SHUFFLE_SEED, buffer_size=SHUFFLE_BUFFER)
            for number, row in enumerate(rows.take(self.data.max_documents) if self.data.max_documents else rows):
                place = f"codeparrot {split}, document {number}"
                yield Document(readers.row_text(row, column, place), None, place)
        except UserError:
            raise
        except Exception as error:  # of the network, of gzip, of Arrow, of the Hub's client
            place = self.data.path or "the Hugging Face Hub"
            raise UserError(
                f"data=codeparrot: reading {place} failed ({type(error).__name__}: {error}).", EXIT_DATA
            ) from error

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
from normfree.errors import EXIT_DATA, UserError

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
    """sha256 over name, size and time of change of (path, name) pairs."""
    digest = hashlib.sha256()
    for path, name in files:
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _PythonFiles:
    """All Python source under some folders. The top-level module or package is the unit that is held out."""

    own_splits = False
    name: str
    licence: str

    def __init__(self, data: DataConfig) -> None:
        self._found: list[tuple[Path, str]] | None = None

    def _roots(self) -> list[Path]:
        raise NotImplementedError

    def _skip(self, folder: str) -> bool:
        return folder == "__pycache__"

    def _files(self) -> list[tuple[Path, str]]:
        """(path, name below its root) of every .py file, in a fixed order."""
        if self._found is None:
            self._found = sorted(self._walk(), key=lambda pair: (pair[1], pair[0]))
        return self._found

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
            content = path.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue  # other people's files, a handful in old encodings
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

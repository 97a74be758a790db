"""The list of packages in pip's own form, and the wheels that it names."""

import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from normfree.errors import EXIT_DATA, UserError

LIST = "packages.txt"
_LINE = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==(\S+) --hash=sha256:([0-9a-f]{64})  # (\S.*)")
_OPTION = "--only-binary :all:"  # an sdist would run code of the package to learn its name
# One kind of machine, whichever this is: else pip looks for wheels of the interpreter it runs in.
_FOR = ["--python-version", "3.12.9", "--implementation", "cp"]
_FOR += [part for tag in ("_2_28", "_2_17", "2014", "_2_5") for part in ("--platform", f"manylinux{tag}_x86_64")]


@dataclass(frozen=True, slots=True)
class Package:
    """A line of the list."""

    name: str  # normalised: lower case, hyphens
    version: str
    sha256: str  # of the wheel
    licence: str


def read_list(path: Path) -> list[Package]:
    """The packages of a list, sorted by name. Raises UserError, which names the line, for anything else in it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of packages cannot be read ({error}).", EXIT_DATA) from None
    found: dict[str, Package] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#") or line == _OPTION:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"{path} line {number} is not `name==version --hash=sha256:...  # licence`: {line!r:.120}", EXIT_DATA
            )
        package = Package(*match.groups())
        if package.name in found:
            raise UserError(f"{path} line {number} names {package.name} a second time.", EXIT_DATA)
        found[package.name] = package
    if not found or _OPTION not in lines:
        raise UserError(f"{path} has no package, or not the line {_OPTION!r}.", EXIT_DATA)
    return [found[name] for name in sorted(found)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(packages: list[Package], listed: Path, folder: Path) -> dict[str, Path]:
    """The wheel of each package in `folder`, by name; pip downloads those that are not there yet.

    pip itself compares the hashes, and takes neither another file nor anything that the packages need. Raises
    UserError with pip's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = {_sha256(path): path for path in sorted(folder.glob("*.whl"))}
    if any(package.sha256 not in here for package in packages):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", *_FOR, "-d", str(folder), "-r", str(listed)]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"pip could not download the packages of {listed}:\n{done.stderr.strip()}", EXIT_DATA)
        here = {_sha256(path): path for path in sorted(folder.glob("*.whl"))}
    missing = [package.name for package in packages if package.sha256 not in here]
    assert not missing, f"pip was content, and the wheels of {missing} are not in {folder}"
    return {package.name: here[package.sha256] for package in packages}

"""What README and CONTRIBUTING promise exists: commands, files, scripts, keys; and the environment is pinned."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import pytest

from normfree import cli, tables
from plotting import SCRIPTS

ROOT = Path(cli.__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
TRAIN = "pip install -r requirements.txt && python run.py model=normfree act=relu"
TEST = "pip install -r requirements-dev.txt && pytest"
# Where a path may start: what is written otherwise (`figures/`, `runs/`, `my_texts/`) is a user's own.
ROOMS = ("normfree/", "plotting/", "conf/", "tests/", "docs/", "examples/", "experiments/", "notebooks/", ".ci/")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def requirement(line: str) -> str:
    """The name of a requirement as pip compares it."""
    return re.split(r"[\s=<>!~;\[#]", line, maxsplit=1)[0].lower().replace("_", "-")


def test_the_two_commands_are_the_only_ones_that_install() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", read("README.md"), re.M | re.S)
    installing = [block.strip() for block in blocks if "pip install" in block]
    assert installing == [TRAIN, TEST]


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/lab-log.md", "experiments/entropic_overload.md"])
def test_every_link_leads_to_a_file(document: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", read(document))
    there = [link for link in links if "://" not in link]
    assert there
    missing = [link for link in there if not ((ROOT / document).parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_of_the_repository_exists(document: str) -> None:
    words = re.findall(r"[\w./-]+", read(document))
    paths = {w.rstrip(".") for w in words if w.startswith(ROOMS)} - {"plotting/mine.py"}
    paths = {p for p in paths if not p.endswith("/mine.yaml")}  # CONTRIBUTING's examples of something new
    assert paths
    missing = [path for path in sorted(paths) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_that_is_run_exists(document: str) -> None:
    for module in re.findall(r"python -m ([\w.]+)", read(document)):
        assert module == "venv" or importlib.util.find_spec(module), module
    for script in re.findall(r"python ([\w/]+\.py)", read(document)):
        assert (ROOT / script).exists(), script


def test_the_table_of_figures_is_complete() -> None:
    named = set(re.findall(r"^\| `plotting/(\w+)\.py", read("README.md"), re.M))
    assert named == set(SCRIPTS)


def test_the_choices_are_complete() -> None:
    """The block under "Choosing" names every file of the groups, and no other."""
    readme = " ".join(read("README.md").split())
    for group in ("model", "size", "norm", "act", "data"):
        written = re.search(rf"\b{group}=([\w.]+(?:\|[\w.]+)+)", readme)
        assert written, group
        assert set(written[1].split("|")) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


@pytest.mark.parametrize("group", ["norm", "act"])
def test_every_norm_and_activation_has_its_file(group: str) -> None:
    """As CONTRIBUTING says: a line in tables.py and a file of two lines."""
    table = {"norm": tables.NORMS, "act": tables.ACTIVATIONS}[group]
    for name in table:
        assert (ROOT / "conf" / group / f"{name}.yaml").read_text() == f"# @package model\n{group}: {name}\n"


def test_ci_runs_the_command_of_the_readme_last() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    lines = [line.strip() for line in read(".ci/run").splitlines()]
    install, test = TEST.split(" && ")
    assert any(line.startswith("pip install") and line.endswith(install.removeprefix("pip install ")) for line in lines)
    assert lines[-1] == test
    assert any('python "$clone/run.py" model=normfree act=relu train.max_steps=20' in line for line in lines)


def test_every_direct_dependency_is_pinned() -> None:
    direct = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    lines = [line.partition("#")[0].strip() for line in read("requirements.txt").splitlines()]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ."
    pinned = {requirement(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    assert len(pinned) == len(lines) - 1, "every line is NAME==VERSION"
    assert pinned == {requirement(line) for line in direct}

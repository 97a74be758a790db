"""notebooks/open_a_run.ipynb runs from top to bottom on a run, and is committed without what it printed."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from normfree import cli
from normfree.runs import Run

NOTEBOOK = Path(cli.__file__).parent.parent / "notebooks" / "open_a_run.ipynb"


@pytest.fixture
def this_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python3` is the interpreter of the tests, whatever kernels the user has installed."""
    from ipykernel.kernelspec import install

    install(prefix=str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter" / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))


def test_it_is_committed_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.mark.usefixtures("this_kernel")
@pytest.mark.parametrize("named", [True, False], ids=["NORMFREE_RUN", "newest"])
def test_it_opens_a_run(named: bool, train_tiny: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_tiny("runs/tiny")
    monkeypatch.setenv("NORMFREE_RUN", str(run.directory) if named else "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    here = {"metadata": {"path": str(run.directory.parent.parent)}}
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources=here).execute()  # raises on a cell's error
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(images) == 3, text
    assert "finished at step 6" in text
    assert "\ndef " in text  # the generated sample

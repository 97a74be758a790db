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
def test_it_opens_the_newest_run(train_tiny: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_tiny("runs/tiny")
    monkeypatch.delenv("NORMFREE_RUN", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    here = {"metadata": {"path": str(run.directory.parent.parent)}}
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources=here).execute()  # raises on a cell's error
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(images) == 3, text
    assert "finished at step 6" in text
    assert "\ndef " in text  # the generated sample


def test_it_opens_the_run_that_is_named(
    train_tiny: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named, _ = train_tiny("elsewhere/named"), train_tiny("runs/newest")
    monkeypatch.setenv("NORMFREE_RUN", str(named.directory))
    code = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    until = next(i for i, source in enumerate(code) if "load_run(os.environ" in source) + 1
    names: dict[str, object] = {}
    for source in code[:until]:
        exec(source.replace("%matplotlib inline", ""), names)
    assert str(named.directory) in capsys.readouterr().out

"""The notebooks run from the first cell to the last, in a kernel of this interpreter, and are kept without outputs."""

import pathlib

import nbclient
import nbformat
import pytest
from ipykernel import kernelspec

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """The name of a kernel that is this very Python, whatever others a person has installed."""
  kernelspec.write_kernel_spec(tmp_path / "kernels" / "this")
  for name, folder in [("JUPYTER_PATH", ""), ("JUPYTER_RUNTIME_DIR", "runtime"), ("IPYTHONDIR", "ipython")]:
    monkeypatch.setenv(name, str(tmp_path / folder))
  monkeypatch.setenv("TMPDIR", str(tmp_path))  # The notebooks' workdirs go with the test.
  return "this"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_shows_figures(path, kernel):
  notebook = nbformat.read(path, as_version=4)
  resources = {"metadata": {"path": str(path.parent)}}
  nbclient.NotebookClient(notebook, timeout=240, kernel_name=kernel, resources=resources).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert not any("Traceback" in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_kept_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)

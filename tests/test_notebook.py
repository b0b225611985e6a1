"""The notebook, run from top to bottom on a tiny training."""

import pytest
from helpers import ROOT

nbclient = pytest.importorskip("nbclient", reason="the notebook needs the extra 'notebook'")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "scripts" / "evaluate.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter_client and traitlets
def test_the_notebook_runs_from_top_to_bottom(trained):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith('WORKDIR = "../runs/shapes"\n') and not any(cell.outputs for cell in cells)
    cells[0].source = cells[0].source.replace('"../runs/shapes"', repr(str(trained)))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    text = "".join(out.get("text", "") for cell in cells for out in cell.outputs)
    assert "mean IoU" in text and "10 images" in text
    pictures = [sum("image/png" in out.get("data", {}) for out in cell.outputs) for cell in cells]
    assert pictures == [0, 0, 0, 1, 3, 1, 3]

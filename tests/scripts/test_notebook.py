"""The notebook is stored without outputs, and runs from its first cell to its last."""

import nbformat
import pytest
from helpers import ROOT, TINY
from nbclient import NotebookClient
from transformers import Dinov2Backbone, Dinov2Config

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SMALL = """DATA, BACKBONE, FOLDER = {demo!r}, ({backbone!r},), {folder!r}
IMAGE_SIZE, EPOCHS_FROZEN, EPOCHS_UNFROZEN = 112, 2, 1"""


@pytest.mark.slow
def test_it_runs_in_a_kernel(demo, tmp_path, monkeypatch):
    """With its settings replaced by those of a small detector, started in its own folder."""
    vit, run = tmp_path / "backbone", tmp_path / "run"
    Dinov2Backbone(Dinov2Config(**TINY | {"num_hidden_layers": 6}, patch_size=14)).save_pretrained(vit)
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert cells[0].source.startswith('DATA = "demo"')
    cells[0].source = SMALL.format(demo=str(demo), backbone=str(vit), folder=str(run))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [out.data for cell in cells for out in cell.outputs if out.output_type == "display_data"]
    assert len([data for data in shown if "image/png" in data or "image/jpeg" in data]) == 2
    assert (run / "detector.pth").is_file() and (run / "charts.png").is_file()

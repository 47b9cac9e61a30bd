"""The notebook runs from its first cell to its last, and is stored without outputs."""

import nbformat
import pytest
import torch
from helpers import ROOT, TINY
from nbclient import NotebookClient
from transformers import Dinov2Backbone, Dinov2Config

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SMALL = """DATA, BACKBONE, FOLDER = {demo!r}, ({backbone!r},), {folder!r}
IMAGE_SIZE, EPOCHS_FROZEN, EPOCHS_UNFROZEN = 112, 2, 1"""


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith('DATA = "demo"')
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_it_runs_in_a_kernel(demo, tmp_path, monkeypatch):
    """With its settings replaced by those of a small detector, started in its own folder."""
    torch.manual_seed(0)
    Dinov2Backbone(Dinov2Config(**TINY | {"num_hidden_layers": 6}, patch_size=14)).save_pretrained(
        tmp_path / "backbone"
    )
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = SMALL.format(demo=str(demo), backbone=str(tmp_path / "backbone"), folder=str(tmp_path / "run"))
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    executed = NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [cell.outputs for cell in executed.cells if cell.cell_type == "code"]
    shown = [out.data for cell in outputs for out in cell if out.output_type == "display_data"]
    assert len([data for data in shown if "image/png" in data or "image/jpeg" in data]) == 2
    assert (tmp_path / "run" / "detector.pth").is_file() and (tmp_path / "run" / "charts.png").is_file()

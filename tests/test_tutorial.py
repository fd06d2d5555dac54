"""The tutorial notebook runs from its first cell to its last, and shows what a run printed."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("onnxruntime")

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    root = NOTEBOOK.parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1, "what the test cuts down"
    quick = "import few\n\nEPOCHS, SAMPLES = 1, 32\nfew.shrink_digits()"
    parameters[0].source = quick
    place = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300, resources=place)
    client.execute()
    assert "243 subnets" in text_of(code[3])
    assert (tmp_path / "runs" / "tutorial" / "winner.onnx").exists()
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2


def test_the_notebook_shows_a_whole_run():
    """What is stored in the file comes from a run with its own settings, good enough to show."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    shares = re.findall(r"largest: ([\d.]+) %|Runtime: ([\d.]+) %", "".join(map(text_of, code)))
    assert len(shares) == 2 and min(float(a or b) for a, b in shares) > 95

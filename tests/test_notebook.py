"""docs/colab.ipynb, run from top to bottom in a copy of the repository, with few steps."""

import re
import shutil
import subprocess

from conftest import ROOT

import nbformat
from nbclient import NotebookClient


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    notebook = nbformat.read(tmp_path / "docs" / "colab.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r"(?m)^STEPS = \d+$", "STEPS = 50", cell.source)
        cell.source = re.sub(r"(?m)^!.* pip install .*$", "", cell.source)  # this environment has the packages
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    outputs = ["".join(part.get("text", "") for part in cell.get("outputs", [])) for cell in notebook.cells]
    assert "val loss" in outputs[2] and outputs[3].count("Once upon a time") == 3
    assert any("image/png" in part.get("data", {}) for part in notebook.cells[3].outputs)
    assert "data/mine: " in outputs[4] and "val loss" in outputs[5] and len(outputs[6]) > 200
    assert not any("error:" in text or "Traceback" in text for text in outputs)

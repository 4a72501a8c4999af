"""The notebooks run, and are stored as they ran."""

import importlib.util
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent.parent / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")


def test_there_are_notebooks():
    assert len(FILES) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_stored_with_its_outputs(file):
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("HUB = False"), "the first cell says which models"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed once, in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs) or file.stem.startswith("03")
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs(file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for cell in runner.execute(file).cells:
        for output in cell.get("outputs", []):
            assert "NOT identical" not in str(output) and "same text as the standard ensemble: False" not in str(output)

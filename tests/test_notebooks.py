"""The notebooks run, and are stored as they ran."""

import importlib.util
import re
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent.parent / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")


def test_there_are_notebooks():
    assert len(FILES) == 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_stored_with_its_outputs(file):
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("HUB = False"), "the first cell says which models"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed once, in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs) or file.stem.startswith("03")
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def shortened(source: str) -> str:
    """Texts, and what is repeated to take times, as short as they may be; benchmarks of fewer points."""
    source = re.sub(r"max_new_tokens=\d\d+", "max_new_tokens=32", source)
    source = re.sub(r'"--max-new-tokens", "\d+"', '"--max-new-tokens", "8"', source)
    source = re.sub(r'"--num-prompts", "\d+"', '"--num-prompts", "1"', source)
    source = re.sub(r"\brange\(\d+\)", "range(2)", source)
    return re.sub(r"\brepeats=\d+", "repeats=1", source)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs(file, monkeypatch, tmp_path):
    """With shorter texts than are stored."""
    notebook = nbformat.read(file, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = shortened(cell.source)
    assert [cell.source for cell in notebook.cells] != sources
    nbformat.write(notebook, file := tmp_path / file.name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for cell in runner.execute(file).cells:
        for output in cell.get("outputs", []):
            assert "NOT identical" not in str(output) and "same text as the standard ensemble: False" not in str(output)

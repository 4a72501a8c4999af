"""
Executes notebooks.

    python notebooks/execute.py                 all of them, and stores their outputs
    python notebooks/execute.py --check FILE    some, and stores nothing

Progress bars and warnings are not stored.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent


def execute(file: Path) -> nbformat.NotebookNode:
    """
    Returns:
        `nbformat.NotebookNode`: The notebook with the outputs of this execution.

    Raises:
        `nbclient.exceptions.CellExecutionError`: if a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    place = {"metadata": {"path": str(file.parent)}}
    NotebookClient(notebook, timeout=1800, resources=place, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}  # whatever the version
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="store nothing")
    args = parser.parse_args()
    for file in args.files or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(file)
        if not args.check:
            nbformat.write(notebook, file)
        print(f"{file.name}: executed")


if __name__ == "__main__":
    main()

"""Imports run one way: from the programs down to the config, and never in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_spec_ensemble


PACKAGE = Path(hf_spec_ensemble.__file__).parent
NAME = PACKAGE.name

# From the top down: folders, or modules of the root. What stands together shares a floor.
FLOORS = (
    ("bench", "demo", "tools", "cli", "harness", "theory"),  # the last three are aliases, for users alone
    ("__init__",),
    ("hub", "recipes"),
    ("fitting", "batches"),
    ("integration",),
    ("decoding",),
    ("schedule",),
    ("members",),
    ("ensemble",),
    ("trace",),
    ("config", "compat", "choices", "files", "notices", "version"),
)

# (importer, imported): what runs up a floor all the same, and why
EXCEPTIONS = frozenset()


def modules(package: Path) -> dict[str, Path]:
    """Files by their dotted names within the package; a folder's `__init__` has the folder's, the package's is ""."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(module: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    folder = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == NAME:
                    found.add(rest)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = folder.split(".") if folder else []
                parts = parts[: len(parts) - (node.level - 1)] + (node.module.split(".") if node.module else [])
            elif node.module.split(".")[0] == NAME:
                parts = node.module.split(".")[1:]
            else:
                continue
            source = ".".join(parts)
            for alias in node.names:
                inside = f"{source}.{alias.name}" if source else alias.name
                found.add(inside if inside in known else source)
    assert found <= known.keys(), f"{file} imports {found - known.keys()}, which are not there"
    return found - {module}


def floor_of(module: str) -> int:
    place = module.split(".")[0] or "__init__"
    floors = [number for number, places in enumerate(FLOORS) if place in places]
    assert len(floors) == 1, f"{place} has no floor: say where it belongs"
    return floors[0]


def faults(package: Path) -> list[str]:
    """What runs up a floor, and a circle if there is one."""
    known = modules(package)
    graph = {module: imports_of(module, file, known) for module, file in known.items()}
    found = [
        f"{module or NAME} imports {imported or NAME}, which is above it"
        for module, imports in graph.items()
        for imported in sorted(imports)
        if floor_of(imported) < floor_of(module) and (module, imported) not in EXCEPTIONS
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle: " + " -> ".join(module or NAME for module in reversed(error.args[1])))
    return found


def test_imports_run_one_way():
    assert faults(PACKAGE) == []


def test_nothing_inside_uses_an_alias():
    known = modules(PACKAGE)
    for module, file in known.items():
        assert imports_of(module, file, known).isdisjoint({"cli", "harness", "theory"}), module


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"members/one.py": "from ..schedule.two import x", "schedule/two.py": ""}, "members.one imports schedule.two"),
        ({"members/one.py": "def f():\n    from ..schedule import two", "schedule/two.py": ""}, "imports schedule.two"),
        ({"members/one.py": f"import {NAME}.hub"}, "members.one imports hub"),
        ({"hub/one.py": "from .. import x"}, f"hub.one imports {NAME}, which is above"),
        ({"trace/a.py": "from .b import x", "trace/b.py": "def f():\n    from . import a"}, "a circle: trace."),
        ({"tools/a.py": "from ..demo.b import x", "demo/b.py": "from ..tools import a"}, "a circle: "),
        ({"trace/a.py": "from ..config import x\nif True:\n    from .b import x", "trace/b.py": ""}, None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(files, said, tmp_path):
    names = {"__init__.py": "", "config.py": ""}
    names |= {f"{folder}/__init__.py": "" for folder in ("hub", "members", "schedule", "trace", "tools", "demo")}
    for name, text in (names | files).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = faults(tmp_path)
    assert found == [] if said is None else len(found) == 1 and said in found[0]


def test_every_folder_says_what_it_owns():
    """And exports nothing, but for what users import from it."""
    for folder in ("ensemble", "members", "schedule", "decoding", "tools"):
        text = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert len(tree.body) == 1 and ast.get_docstring(tree) and "ever" in text, folder

"""
The console script `hf-spec-ensemble`: parses its words before anything that takes seconds is imported, then runs
`hf_spec_ensemble.tools.cli`.

Apart from the package, since importing anything of that imports torch and transformers.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


PACKAGE = "hf_spec_ensemble"


def parse(words: list[str]) -> None:
    """Runs `hf_spec_ensemble.tools.options.parse` without the package's own `__init__`."""
    bare = ModuleType(PACKAGE)
    bare.__path__ = find_spec(PACKAGE).submodule_search_locations
    sys.modules[PACKAGE] = bare
    try:
        import_module(f"{PACKAGE}.tools.options").parse(words)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]


def main() -> None:
    words = sys.argv[1:]
    if PACKAGE not in sys.modules:
        parse(words)

    from hf_spec_ensemble.tools.cli import main as command

    command(words)


if __name__ == "__main__":
    main()

"""Optional packages that some methods of a trace need."""

import importlib
from types import ModuleType


def extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'This needs {name}: pip install "hf_spec_ensemble[notebooks]"') from error

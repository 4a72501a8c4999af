"""What is read from files: JSON objects, or an error that names the file. Nothing else of the package parses JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


LONGEST = 500  # characters of a message that quotes a file


def parse_object(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """
    The JSON object that a text is.

    Args:
        text (`str` or `bytes`): In UTF-8.
        where (`str` or `Path`): What a message calls it.

    Raises:
        `ValueError`: if it is not JSON, or no object, or nested too deep.

    Example:

    >>> from hf_spec_ensemble.files import parse_object

    >>> parse_object('{"weights": [0.7, 0.3]}', "a file")
    {'weights': [0.7, 0.3]}
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deep.") from None
    except ValueError as error:  # or not UTF-8, or a number of thousands of digits
        raise ValueError(f"{where} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, as {{...}}, but is {str(value)[:40]!r}.")
    return value


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """
    Puts the file's name before what is said of its content.

    Raises:
        `ValueError`: in place of errors of value and type, and of what is nested too deep to be shown.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{file} is nested too deep.") from None
    except (ValueError, TypeError) as error:
        said = str(error)
        raise ValueError(f"{file}: {said if len(said) <= LONGEST else said[:LONGEST] + ' ...'}") from error

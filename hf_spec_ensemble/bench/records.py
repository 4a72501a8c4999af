"""The measurements as JSON lines: a header with all that they have in common, then one line for each, as it is made.

A folder holds a file of them for each process. A line's key is all that may differ within it. What is there is not
measured again. A file with another header is refused: numbers of different settings or versions do not belong in one
table.
"""

import json
from pathlib import Path
from typing import Any

from ..files import parse_object
from ..tools.processes import Process, parts_of


FILE = "records.jsonl"
Record = dict[str, Any]
CONDITION = ("task", "temperature", "batch_size", "members", "prompt_length")
KEY = ("kind", *CONDITION, "variant", "group", "seed", "repeat", "row", "model")


def key_of(record: Record) -> tuple:
    """What determines a record; `row` is only of divergences, `model` of what passes cost. Not all are of a prompt."""
    return tuple(record.get(name) for name in KEY)


class Records:
    """
    A folder of records, new or continued: `records.jsonl`, and `records.rank1.jsonl` and so on of further processes.
    All these parts are read as one, whoever wrote them and in whatever order. One of them is written to.

    Args:
        folder (`Path`): Made with the first record.
        header (`dict`): What all records share: `settings` and `environment`, of JSON types.
        rank (`int`, *optional*, defaults to 0): The process whose part is written to.

    Raises:
        `ValueError`: if a part has another header; the message names what differs. Or if it holds no records.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_spec_ensemble.bench import Records

    >>> folder, header = Path(tempfile.mkdtemp()), {"settings": {"dtype": "float32"}}
    >>> Records(folder, header, rank=1).add({"kind": "run", "variant": "auto", "seconds": 1.5})
    >>> {"kind": "run", "variant": "auto"} in Records(folder, header)
    True
    """

    def __init__(self, folder: Path, header: Record, rank: int = 0):
        self.folder = folder
        self.header = header
        self._own = Process(rank).part(folder / FILE)
        self._begun = False
        self.read()

    @property
    def parts(self) -> list[Path]:
        """The files that there are, of this run or earlier ones."""
        return parts_of(self.folder / FILE)

    def read(self) -> None:
        """Reads all parts, with what other processes have written by now, up to their last whole lines."""
        self._records: dict[tuple, Record] = {}
        for part in self.parts:
            for key, record in self._parsed(part, _whole_lines(part)).items():
                self._records.setdefault(key, record)  # what two have measured is the first part's, for all readers

    def __contains__(self, key: Record) -> bool:
        return key_of(key) in self._records

    def __getitem__(self, key: Record) -> Record:
        return self._records[key_of(key)]

    def of_kind(self, kind: str) -> list[Record]:
        """The records of a kind, in no particular order."""
        return [record for record in self._records.values() if record["kind"] == kind]

    def add(self, record: Record) -> None:
        """Keeps a record and writes its line at once."""
        self._records[key_of(record)] = record
        if not self._begun:
            self._begin()
        with self._own.open("ab") as lines:
            lines.write(_line(record))

    def _begin(self) -> None:
        """Prepares the own part for the next line: makes it, or cuts off a line whose writing was interrupted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._own.open("ab") as lines:
            whole = len(_whole_lines(self._own))
            lines.truncate(whole)
            if not whole:
                lines.write(_line({"kind": "header", **self.header}))
        self._begun = True

    def _parsed(self, file: Path, text: bytes) -> dict[tuple, Record]:
        """The records of a file's lines, if its header is ours."""
        if not text:
            return {}
        lines = text.split(b"\n")[:-1]
        header, *records = [parse_object(line, f"Line {i} of {file}") for i, line in enumerate(lines, 1)]
        differences = _differences(header, {"kind": "header", **json.loads(json.dumps(self.header))})
        if differences:
            raise ValueError(
                f"{file} holds measurements that were made otherwise: {'; '.join(differences)}. Numbers of both "
                "do not belong into one table: go on with the former, or write to another folder with --out."
            )
        for i, record in enumerate(records, 2):
            if "kind" not in record or any(isinstance(part, (list, dict)) for part in key_of(record)):
                raise ValueError(f"Line {i} of {file} is not a record: {str(record)[:80]!r}.")
        return {key_of(record): record for record in records}


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _whole_lines(file: Path) -> bytes:
    """A file's lines, without one that is not written to its end."""
    text = file.read_bytes()
    return text[: text.rfind(b"\n") + 1]


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two JSON objects differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(key for key in new if key not in old)]
        return [x for key in names for x in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {old!r} and is now {new!r}"]

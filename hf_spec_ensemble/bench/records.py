"""The measurements as JSON lines: a header with all that they have in common, then one line for each, as it is made.

A line's key is all that may differ within a file. What is in the file is not measured again; a file whose header is
another is refused, for numbers of different settings or versions do not belong into one table.
"""

import json
from pathlib import Path
from typing import Any


Record = dict[str, Any]
CONDITION = ("task", "temperature", "batch_size", "members", "prompt_length")
KEY = ("kind", *CONDITION, "variant", "group", "seed", "repeat", "row")


def key_of(record: Record) -> tuple:
    """What determines a record; `row` only of divergences."""
    return tuple(record.get(name) for name in KEY)


class Records:
    """
    A file of records, new or continued.

    Args:
        file (`Path`): JSON lines.
        header (`dict`): What all records share: `settings` and `environment`, of JSON types.

    Raises:
        `ValueError`: if the file has another header; the message names what differs.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_spec_ensemble.bench import Records

    >>> file = Path(tempfile.mkdtemp()) / "records.jsonl"
    >>> Records(file, {"settings": {"dtype": "float32"}}).add({"kind": "run", "variant": "auto", "seconds": 1.5})
    >>> {"kind": "run", "variant": "auto"} in Records(file, {"settings": {"dtype": "float32"}})
    True
    """

    def __init__(self, file: Path, header: Record):
        self.file = file
        self.header = header
        self._records: dict[tuple, Record] = {}
        if file.is_file() and file.stat().st_size:
            self._read()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append({"kind": "header", **header})

    def __contains__(self, key: Record) -> bool:
        return key_of(key) in self._records

    def __getitem__(self, key: Record) -> Record:
        return self._records[key_of(key)]

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self._records.values() if record["kind"] == kind]

    def add(self, record: Record) -> None:
        """Keeps a record and writes its line at once."""
        self._records[key_of(record)] = record
        self._append(record)

    def _append(self, record: Record) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    def _read(self) -> None:
        text = self.file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # the last line was cut off
            self.file.write_bytes(whole)
        lines = whole.decode().splitlines()
        if not lines:
            self._append({"kind": "header", **self.header})
            return
        try:
            header, *records = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.file} is not a file of records: {error}.") from None
        differences = _differences(header, {"kind": "header", **json.loads(json.dumps(self.header))})
        if differences:
            raise ValueError(
                f"{self.file} holds measurements that were made otherwise: {'; '.join(differences)}. Numbers of both "
                "do not belong into one table: write to another folder with --out."
            )
        self._records = {key_of(record): record for record in records}


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two JSON objects differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(key for key in new if key not in old)]
        return [x for key in names for x in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {old!r} and is now {new!r}"]

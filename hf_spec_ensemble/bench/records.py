"""The measurements as JSON lines: a header with all that they have in common, then one line for each, as it is made.

A line's key is all that may differ within a file. What is in the file is not measured again; a file whose header is
another is refused, for numbers of different settings or versions do not belong into one table.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import parse_object


Record = dict[str, Any]
CONDITION = ("task", "temperature", "batch_size", "members", "prompt_length")
KEY = ("kind", *CONDITION, "variant", "group", "seed", "repeat", "row")


def key_of(record: Record) -> tuple:
    """What determines a record; `row` is only of divergences, and what compiling took is of no prompt."""
    return tuple(record.get(name) for name in KEY)


class Records:
    """
    A file of records, new or continued. It is made with the first of them.

    Args:
        file (`Path`): JSON lines.
        header (`dict`): What all records share: `settings` and `environment`, of JSON types.

    Raises:
        `ValueError`: if the file has another header; the message names what differs. Or if it holds no records.

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
        whole, cut_off = _whole_lines(file)
        self._records = self._parsed(file, whole)
        if cut_off:
            os.truncate(file, len(whole))  # not written anew: other processes may be reading

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

    def begin(self) -> None:
        """Makes the file, if there is none, with the header alone."""
        if not (self.file.is_file() and self.file.stat().st_size):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(_line({"kind": "header", **self.header}), encoding="utf-8")

    def take_in(self, files: Sequence[Path]) -> None:
        """
        Knows what other files hold too, which other processes may be writing to, without writing it.

        Raises:
            `ValueError`: if a file has another header.
        """
        for file in files:
            for key, record in self._parsed(file, _whole_lines(file)[0]).items():
                self._records.setdefault(key, record)

    def merge(self, files: Sequence[Path]) -> None:
        """Writes all that is known to the file, at once, and removes those that it was taken in from."""
        temporary = self.file.with_suffix(".merging")
        with temporary.open("w", encoding="utf-8") as lines:
            lines.writelines(map(_line, [{"kind": "header", **self.header}, *self._records.values()]))
            lines.flush()
            os.fsync(lines.fileno())
        os.replace(temporary, self.file)
        for file in files:
            file.unlink(missing_ok=True)

    def _append(self, record: Record) -> None:
        self.begin()
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(_line(record))

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
                "do not belong into one table: write to another folder with --out."
            )
        for i, record in enumerate(records, 2):
            if "kind" not in record or any(isinstance(part, (list, dict)) for part in key_of(record)):
                raise ValueError(f"Line {i} of {file} is no record: {str(record)[:80]!r}.")
        return {key_of(record): record for record in records}


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _whole_lines(file: Path) -> tuple[bytes, bool]:
    """A file's lines, and whether there is another that is not written to its end. None of a file that is not there."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return b"", False
    whole = text[: text.rfind(b"\n") + 1]
    return whole, len(whole) < len(text)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two JSON objects differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(key for key in new if key not in old)]
        return [x for key in names for x in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {old!r} and is now {new!r}"]

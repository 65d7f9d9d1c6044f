"""A dataset's rows, read one at a time, each with a place to name when it is wrong.

Rows of a JSON Lines file are found by their offsets and parsed when asked for, so that a large file costs no memory and
a bad line is named by its number. Everything here can be pickled to worker processes and reopens its file there.

Left out on purpose: what rows mean (``schemas``), where a dataset's files are (``files``, ``hub``).
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from luthier.errors import UserError

Row = dict[str, Any]
SAMPLE = 100
"""Rows looked at for the columns of a format that does not list them."""
_MAX_FIELD = 2**31 - 1
"""Characters of a CSV field: the most that ``csv`` takes on every system. Its own limit is 131,072."""


class Rows(Protocol):
    """A sequence of rows. ``fingerprint`` stands for their content, ``source`` for the dataset in messages."""

    source: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        ...

    @property
    def fingerprint(self) -> str:
        """A text that changes with the rows' content."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """Where row ``index`` stands, for a message: file and line, or dataset and row number, from 1."""
        ...


class JsonLines:
    """A file of one JSON object a line; blank lines are skipped."""

    def __init__(self, path: Path):
        self.path = path
        self.source = str(path)
        starts, lines, offset = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(offset)
                    lines.append(number)
                offset += len(line)
        self._starts_C, self._lines_C = np.array(starts, np.int64), np.array(lines, np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of the first rows."""
        return _keys([self[index] for index in range(min(len(self), SAMPLE))])

    @property
    def fingerprint(self) -> str:
        """Hash of the file's bytes."""
        return hash_file(self.path)

    @cached_property
    def _file(self) -> Any:
        return self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __len__(self) -> int:
        return len(self._starts_C)

    def __getitem__(self, index: int) -> Row:
        self._file.seek(int(self._starts_C[index]))
        try:
            row = json.loads(self._file.readline().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            forms = "one JSON object a line" if self.path.suffix != ".json" else "a list of rows, or one row a line"
            raise UserError(f"{self.place(index)}: not valid JSON: {error}. Give {forms}, in UTF-8.") from None
        return _object(row, self.place(index))

    def place(self, index: int) -> str:
        """File and line."""
        return f"{self.path}, line {self._lines_C[index]}"


class Records:
    """Rows held in memory: a JSON array or a CSV file."""

    def __init__(self, path: Path, rows: Sequence[Any], numbers: Sequence[int], unit: str):
        self.path = path
        self.source = str(path)
        self._rows, self._numbers, self._unit = rows, numbers, unit

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of the first rows."""
        return _keys([self[index] for index in range(min(len(self), SAMPLE))])

    @property
    def fingerprint(self) -> str:
        """Hash of the file's bytes."""
        return hash_file(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return dict(_object(self._rows[index], self.place(index)))

    def place(self, index: int) -> str:
        """File and line or row."""
        return f"{self.path}, {self._unit} {self._numbers[index]}"


class Parquet:
    """A Parquet file, memory-mapped."""

    def __init__(self, path: Path):
        self.path = path
        self.source = str(path)
        self._length = len(self._table)

    @cached_property
    def _table(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(self.path, memory_map=True)
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path}: not a Parquet file that can be read: {error}.") from None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the file's own schema."""
        return tuple(self._table.column_names)

    @property
    def fingerprint(self) -> str:
        """Hash of the file's bytes."""
        return hash_file(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return self._table.slice(index, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        """File and row, from 1."""
        return f"{self.path}, row {index + 1}"


class Chain:
    """Several sources, one after another."""

    def __init__(self, parts: Sequence[Rows], source: str):
        self.source = source
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all parts."""
        return tuple(dict.fromkeys(column for part in self._parts for column in part.columns))

    @property
    def fingerprint(self) -> str:
        """Of the parts, in order."""
        return digest(*(part.fingerprint for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        part, inner = self._find(index)
        return part[inner]

    def place(self, index: int) -> str:
        """The place in the part that holds the row."""
        part, inner = self._find(index)
        return part.place(inner)

    def _find(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


class Selected:
    """Some rows of another source, in the order of ``indices_C``."""

    def __init__(self, rows: Rows, indices_C: np.ndarray):
        self.source = rows.source
        self._rows, self._indices_C = rows, indices_C

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the source."""
        return self._rows.columns

    @property
    def fingerprint(self) -> str:
        """Of the source and the choice."""
        return digest(self._rows.fingerprint, self._indices_C.astype(np.int64).tobytes())

    def __len__(self) -> int:
        return len(self._indices_C)

    def __getitem__(self, index: int) -> Row:
        return self._rows[int(self._indices_C[index])]

    def place(self, index: int) -> str:
        """The place in the source."""
        return self._rows.place(int(self._indices_C[index]))


def read_file(path: Path) -> Rows:
    """Open a data file by its suffix. Raises UserError for one that cannot be read as what it is called."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Parquet(path)
    if suffix == ".csv":
        return _csv(path)
    return _json_array(path) if suffix == ".json" and _first_character(path) == b"[" else JsonLines(path)


def digest(*parts: str | bytes | memoryview) -> str:
    """Return a hash of the parts that does not run them together."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def hash_file(path: Path) -> str:
    """Return a hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _json_array(path: Path) -> Records:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from None
    return Records(path, rows, range(1, len(rows) + 1), "row")


def _csv(path: Path) -> Records:
    rows, lines = [], []
    csv.field_size_limit(_MAX_FIELD)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            names = reader.fieldnames or ()
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(f"{path}, line 1: more than one column `{twice[0]}`. Rename or remove one.")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: more or fewer fields than the header's "
                        f"{len(names)}. Quote fields that hold commas or line breaks."
                    )
                rows.append(row)
                lines.append(reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: not valid CSV in UTF-8: {error}.") from None
    return Records(path, rows, lines, "line")


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: {type(row).__name__} where an object with named columns should be.")
    return row


def _keys(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for row in rows for key in row))

"""``formatting_func_path``: a user's function that rewrites each row before its columns are looked at.

The function takes a row as a dictionary, and ``formatting_func_kwargs``; what it returns is laid over the row, as
``datasets``' own ``map`` does.

Left out on purpose: functions over batches of rows, and functions that drop or add rows.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.data import functions
from luthier.data.rows import SAMPLE, Rows, digest
from luthier.errors import UserError

_KEY = "formatting_func_path"


class Formatted:
    """Rows of another source, each rewritten by the function at ``path``. Raises UserError if there is none."""

    def __init__(self, rows: Rows, path: str, kwargs: Mapping[str, Any]):
        self.source = rows.source
        self._rows, self._path, self._kwargs = rows, path, dict(kwargs)
        self._function = functions.load(path, _KEY)

    @cached_property
    def _function(self) -> Callable[..., Any]:
        return functions.load(self._path, _KEY)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the first rows as rewritten."""
        return tuple(dict.fromkeys(column for _, made in self._sample for column in made))

    @property
    def added(self) -> tuple[str, ...]:
        """The columns that the rows did not have before."""
        return tuple(column for column in self.columns if column not in self._rows.columns)

    @property
    def changed(self) -> tuple[str, ...]:
        """The columns that the function added to one of the first rows, or gave another value there."""
        return tuple(
            column
            for column in self.columns
            if any(column in made and (column not in row or row[column] != made[column]) for row, made in self._sample)
        )

    @cached_property
    def _sample(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        return [(self._rows[index], self[index]) for index in range(min(len(self), SAMPLE))]

    @property
    def fingerprint(self) -> str:
        """Of the source, the function's whole file and its arguments; not of what the file imports."""
        file = inspect.getsourcefile(self._function)
        code = Path(file).read_bytes() if file else b""
        kwargs = json.dumps(self._kwargs, sort_keys=True, default=repr)
        return digest(self._rows.fingerprint, self._path, code, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_function", "_sample")}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, function = self._rows[index], self._function
        try:
            # A copy to its depth: rows held in memory would stay changed where the function changes them in place.
            made = function(copy.deepcopy(row), **self._kwargs)
        except Exception as error:
            # The function is the user's: whatever it raises is about this row or about the function.
            reason = f"{type(error).__name__}: {error}.{functions.line_of(error)}"
            raise UserError(f"{self.place(index)}: {self._path} failed: {reason}") from error
        if not isinstance(made, Mapping):
            found = type(made).__name__
            raise UserError(f"{self.place(index)}: {self._path} returned {found}; it should return the row, a dict.")
        return {**row, **made}

    def place(self, index: int) -> str:
        """The place in the source."""
        return self._rows.place(index)

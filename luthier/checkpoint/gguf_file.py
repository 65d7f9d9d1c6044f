"""The container of a GGUF file: its metadata, where its tensors lie, and their values as float32.

The header is parsed here, because the gguf package's reader keeps an array for every vocabulary entry (seconds for a
model of 135M); dequantisation is that package's. Every tensor reads as float32, which holds each stored type exactly.
Left out on purpose: what the metadata mean (``gguf``), split files and big-endian files.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.checkpoint.tensors import aligned
from luthier.errors import UserError

_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: ``shape`` row-major, ``kind`` the number of its ggml type, ``offset`` in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file and {name: entry} of its tensors, under llama.cpp's names."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]

    @property
    def architecture(self) -> str:
        """The name by which llama.cpp knows the kind of model."""
        return self.metadata.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the architecture's own value of ``key``, such as ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return such a value as the decimal that it was written as: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def values(self, name: str) -> np.ndarray:
        """Return a whole tensor.

        Raises UserError for a type that cannot be dequantised, or a file that is not whole.
        """
        entry = self.entries[name]
        return values(self.path, entry.offset, entry.shape, self.kind(name))

    def kind(self, name: str) -> Any:
        """Return a tensor's GGMLQuantizationType, and make sure that the file holds the whole of it.

        Raises UserError as ``values`` does.
        """
        from gguf import GGMLQuantizationType

        entry = self.entries[name]
        known = {kind.value: kind.name for kind in GGMLQuantizationType}
        if known.get(entry.kind) not in _TYPES:
            found = known.get(entry.kind, f"number {entry.kind}")
            raise UserError(
                f"{self.path}: tensor `{name}` has type {found}, which cannot be read. Supported: {', '.join(_TYPES)}."
            )
        kind = GGMLQuantizationType(entry.kind)
        end = entry.offset + stored_bytes(entry.shape, kind)
        if end > self.path.stat().st_size:
            raise UserError(f"{self.path}: cut short: tensor `{name}` ends at byte {end:,}. Download it again.")
        return kind


def read_header(path: Path) -> Header:
    """Parse the header. Raises UserError where the file is not a whole GGUF of version 2 or 3."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file. Download it again (a Git LFS pointer, perhaps).")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                return _parse(path, _Cursor(buffer, 4))
            except (struct.error, IndexError):
                raise UserError(f"{path}: the header is cut short. Download it again.") from None


def values(path: Path, offset: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Return the values at ``offset`` as float32.

    They are dequantised by groups of rows, so that no second whole copy arises.
    """
    from gguf.quants import dequantize

    raw = np.fromfile(path, np.uint8, count=stored_bytes(shape, kind), offset=offset)
    if kind.name == "F32":
        return raw.view(np.float32).reshape(shape)
    rows = raw.reshape(math.prod(shape[:-1]), -1)
    values = aligned((len(rows), shape[-1]), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        group = slice(start, start + _ROWS_AT_ONCE)
        values[group] = dequantize(rows[group], kind)
    return values.reshape(shape)


def stored_bytes(shape: tuple[int, ...], kind: Any) -> int:
    """Return how many bytes a tensor takes in the file."""
    from gguf.quants import quant_shape_to_byte_shape

    return math.prod(quant_shape_to_byte_shape(shape, kind))


class _Cursor:
    """Reads GGUF's little-endian values one after the other."""

    _NUMBERS: Mapping[int, str] = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    _STRING, _ARRAY = 8, 9

    def __init__(self, buffer: mmap.mmap, offset: int) -> None:
        self.buffer, self.offset = buffer, offset

    def number(self, form: str) -> Any:
        value = struct.unpack_from("<" + form, self.buffer, self.offset)[0]
        self.offset += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.offset += length
        return self.buffer[self.offset - length : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == self._STRING:
            return self.string()
        if kind == self._ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in (self._STRING, self._ARRAY):
                return [self.value(inner) for _ in range(count)]
            form = f"<{count}{self._NUMBERS[inner]}"
            values = struct.unpack_from(form, self.buffer, self.offset)
            self.offset += struct.calcsize(form)
            return list(values)
        return self.number(self._NUMBERS[kind])


def _parse(path: Path, cursor: _Cursor) -> Header:
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not supported; 2 and 3 are.")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    found = {}
    for _ in range(tensors):
        name = cursor.string()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        found[name] = Entry(shape[::-1], cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(cursor.offset / alignment) * alignment
    entries = {name: Entry(entry.shape, entry.kind, start + entry.offset) for name, entry in found.items()}
    return Header(path, metadata, entries)

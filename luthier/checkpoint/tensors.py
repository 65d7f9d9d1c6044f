"""Named tensors in files: shape and type from the header, values one tensor at a time.

The safetensors format is eight bytes of length, a JSON header and the values, so that reading and writing it take a
few lines here. The library's own writer takes all tensors of a file at once; this one takes them as they come, which
keeps the memory of a save at one tensor. A block of a tensor is read without the rest. Left out on purpose: memory
mapping, whose pages would count as ours.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from luthier.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_PAGE = 4096
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies elsewhere: ``shape`` and ``dtype`` are known, ``read()`` brings the values.

    ``cut(block)``, where there is one, brings those of a block alone: a slice of each dimension, from a first entry to
    the one after the last.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    cut: Callable[[Sequence[slice]], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_folder(folder: Path) -> dict[str, Stored]:
    """Return {name: tensor} of a Hugging Face folder's safetensors: one file, or shards with their index.

    Raises UserError where there are none, a shard of the index is missing, or a file is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        shards = _shards(index)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{index}: names {len(missing)} of {len(shards)} shards that are not in the folder: "
                f"{', '.join(missing[:5])}. Download the checkpoint again."
            )
    elif (folder / SINGLE).is_file():
        shards = [SINGLE]
    else:
        raise UserError(f"{folder}: {_no_weights(folder)}")
    return {name: tensor for shard in shards for name, tensor in read_safetensors(folder / shard).items()}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Return {name: tensor} of one file. Raises UserError where it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise UserError(f"{path}: not a safetensors file. Download it again (a Git LFS pointer, perhaps).")
        text = file.read(length)
    start = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise UserError(f"{path}: cut short at {size:,} of {end:,} bytes. Download it again.")
        return {name: _stored(path, name, entry, start) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: its header is garbled, so it is damaged. Download it again.") from None


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write one file, reading one tensor at a time, and make sure that it is on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            _write_values(file, tensor)
        file.flush()
        os.fsync(file.fileno())


def shard(tensors: Mapping[str, Stored], limit: int) -> dict[str, dict[str, Stored]]:
    """Return {file name: its tensors}, each file at most ``limit`` bytes of values unless one tensor is more."""
    groups: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def index(shards: Mapping[str, Mapping[str, Stored]]) -> dict[str, Any]:
    """Return the contents of the index file of ``shards``."""
    total = sum(tensor.nbytes for group in shards.values() for tensor in group.values())
    weight_map = {name: file for file, group in shards.items() for name in group}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an empty array at a 64-byte boundary, which a device in the host's own memory takes without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index}: no JSON with a `weight_map` from tensors to files, so it is damaged. Download it again."
        ) from None


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Stored:
    if entry["dtype"] not in _TYPES:
        raise UserError(f"{path}: tensor `{name}` has type {entry['dtype']}, which is not supported.")
    shape, dtype = tuple(entry["shape"]), _TYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path}: tensor `{name}` has {end - begin} bytes for shape {shape}. Download it again.")

    def cut(block: Sequence[slice]) -> np.ndarray:
        return _read_block(path, start + begin, shape, dtype, block)

    return Stored(shape, dtype, lambda: cut([slice(0, size) for size in shape]), cut)


def _read_block(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype, block: Sequence[slice]) -> np.ndarray:
    """Return a block of the tensor that begins at byte ``start``; what lies between its runs is not read.

    Runs shorter than a page are cut from whole rows, since the disk reads pages anyway.
    """
    sizes = [where.stop - where.start for where in block]
    cut = max((axis for axis, size in enumerate(sizes) if size != shape[axis]), default=0)
    if cut and sizes[cut] * math.prod(shape[cut + 1 :]) * dtype.itemsize < _PAGE:
        rows = [*block[:cut], *(slice(0, size) for size in shape[cut:])]
        whole = _read_block(path, start, shape, dtype, rows)
        return whole[(*[slice(None)] * cut, *block[cut:])]
    values = aligned(tuple(sizes), dtype)
    if not values.size:
        return values
    runs = values.reshape(-1).view(np.uint8).reshape(math.prod(sizes[:cut]), -1)
    strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    with path.open("rb", buffering=0) as file:
        for run, place in zip(runs, np.ndindex(*sizes[:cut]), strict=True):
            first = [where.start + (place[axis] if axis < cut else 0) for axis, where in enumerate(block)]
            _read_exactly(file, start + sum(np.multiply(first, strides).tolist()), run)
    return values


def _read_exactly(file: Any, start: int, values: np.ndarray) -> None:
    """Fill ``values``, bytes, from ``start`` on. The system reads at most 2 GiB at once."""
    done = 0
    while done < len(values):
        count = os.preadv(file.fileno(), [values.data[done:]], start + done)
        if count == 0:
            raise UserError(f"{file.name}: ends at {start + done:,} bytes, sooner than it did. Download it again.")
        done += count


def _write_values(file: BinaryIO, tensor: Stored) -> None:
    """A function of its own, so that one tensor is let go before the next is read."""
    values = np.ascontiguousarray(tensor.read(), tensor.dtype)
    file.write(values.reshape(-1).view(np.uint8).data)


def _no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"found {', '.join(others[:5])} without {INDEX}. Name the one file {SINGLE}, or add the index."
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"holds {pickled[0]}, a pickle, and no safetensors. Convert it once, where torch is installed: "
            "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)`."
        )
    return f"no weights: {SINGLE} or {INDEX} is missing."

"""Weights that bitsandbytes has quantised, read as the floats that they stand for.

Four bits (NF4 or FP4, arXiv 2305.14314): a byte holds two codes, the first in its high half, and blocks of values share
a scale, which may itself be a code of eight bits. Eight bits (LLM.int8(), arXiv 2208.07339): a row shares a scale.
Tables of values and block sizes are those that the files hold.

Left out on purpose: writing them, and the tiled orders of eight bits that bitsandbytes itself has given up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from luthier.checkpoint.tensors import Stored, aligned
from luthier.errors import UserError

_FLOATS = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16")}
_STATE = ".quant_state.bitsandbytes__"
_MORE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
_VALUES_AT_ONCE = 1 << 20


class _Scales(NamedTuple):
    """Codes or fp32 scales, and of codes their values, the size of their blocks, the blocks' scales and an offset."""

    stored: Stored
    values: Stored | None = None
    second: Stored | None = None
    block: int = 0
    offset: float = 0.0

    def read(self) -> np.ndarray:
        scales = self.stored.read()
        if self.values is None or self.second is None:
            return scales.astype(np.float32)
        spread = self.second.read().repeat(self.block)[: scales.size]
        return self.values.read()[scales] * spread + np.float32(self.offset)


def read(tensors: Mapping[str, Stored], config: Mapping[str, Any], place: Path) -> dict[str, Stored]:
    """Return ``tensors`` with each quantised weight and what belongs to it replaced by one tensor of floats.

    Their type is that which the files or, of eight bits, ``config`` name. Raises UserError where parts are missing.
    """
    result = {}
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    for name, tensor in tensors.items():
        if name in states:
            result[name] = _four_bits(name, states[name], tensors, place)
        elif tensor.dtype == np.int8:
            result[name] = _eight_bits(name, tensors, config, place)
        elif _STATE not in name and not (name.endswith(_MORE) and _owner(name) in tensors):
            result[name] = tensor
    return result


def _owner(name: str) -> str:
    """Return the weight that a tensor such as ``q_proj.weight.absmax`` or ``q_proj.SCB`` belongs to."""
    stem = name.rpartition(".")[0]
    return stem if stem.endswith(".weight") else f"{stem}.weight"


def _four_bits(name: str, state_name: str, tensors: Mapping[str, Stored], place: Path) -> Stored:
    state = _state(tensors[state_name], state_name, place)
    try:
        shape, dtype, block = tuple(state["shape"]), _FLOATS[state["dtype"]], int(state["blocksize"])
        table, scales = tensors[f"{name}.quant_map"], _Scales(tensors[f"{name}.absmax"])
        if "nested_blocksize" in state:
            values, second = tensors[f"{name}.nested_quant_map"], tensors[f"{name}.nested_absmax"]
            scales = _Scales(scales.stored, values, second, state["nested_blocksize"], state["nested_offset"])
    except KeyError as error:
        raise UserError(f"{place}: {name} has four bits, and lacks {error}. Download the checkpoint again.") from None
    count, packed = math.prod(shape), tensors[name]
    if packed.nbytes != -(-count // 2) or math.prod(scales.stored.shape) != -(-count // block):
        raise UserError(
            f"{place}: {name} has {packed.nbytes} bytes and {math.prod(scales.stored.shape)} scales, which do not fit "
            f"{shape} in blocks of {block}. Download the checkpoint again."
        )
    return Stored(shape, dtype, partial(_four_bit_values, packed, table, scales, block, shape, dtype))


def _state(stored: Stored, name: str, place: Path) -> dict[str, Any]:
    try:
        return json.loads(stored.read().tobytes())
    except ValueError:  # of JSON or of UTF-8
        raise UserError(f"{place}: {name} is not the JSON that it should be. Download the checkpoint again.") from None


def _four_bit_values(
    packed: Stored, table: Stored, scales: _Scales, block: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Multiply in fp32 and round once, some blocks at a time so that no whole fp32 copy arises."""
    codes, numbers, factors = packed.read().reshape(-1).view(np.uint8), table.read(), scales.read()
    values = aligned((math.prod(shape),), dtype)
    step = max(1, _VALUES_AT_ONCE // block) * block
    for start in range(0, values.size, step):
        part = values[start : start + step]
        pairs = codes[start // 2 : (start + step) // 2]
        halves = np.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[: part.size]
        part[...] = numbers[halves] * factors[start // block : (start + step) // block].repeat(block)[: part.size]
    return values.reshape(shape)


def _eight_bits(name: str, tensors: Mapping[str, Stored], config: Mapping[str, Any], place: Path) -> Stored:
    stem, tensor = name.removesuffix("weight"), tensors[name]
    scale, order = tensors.get(f"{stem}SCB"), tensors.get(f"{stem}weight_format")
    if scale is None or scale.shape != tensor.shape[:1]:
        raise UserError(f"{place}: {name} is int8 without {stem}SCB to fit it. Download the checkpoint again.")
    if order is not None and order.read().any():
        raise UserError(f"{place}: {name} is stored in tiles, not by rows. Save it anew with a recent bitsandbytes.")
    dtype = _FLOATS.get(config.get("dtype") or config.get("torch_dtype") or "", _FLOATS["float16"])
    return Stored(tensor.shape, dtype, partial(_eight_bit_values, tensor, scale, dtype))


def _eight_bit_values(tensor: Stored, scale: Stored, dtype: np.dtype) -> np.ndarray:
    codes, scales, values = tensor.read(), scale.read(), aligned(tensor.shape, dtype)
    step = max(1, _VALUES_AT_ONCE // codes.shape[1])
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        values[rows] = codes[rows] * scales[rows, None] * np.float32(1 / 127)
    return values

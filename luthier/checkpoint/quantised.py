"""Released quantised weights, read as the floats that they stand for.

Three kinds: fp8 with a scale for each block (DeepSeek-V3 and R1) or for each tensor; MXFP4 (gpt-oss), where 32 values
of four bits share a power of two (Open Compute Project, Microscaling Formats, version 1.0), both of which become
bfloat16 as in their makers' own conversions; and bitsandbytes' (``bitsandbytes``). Left out on purpose: writing them,
and every other method, which is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from luthier.checkpoint import bitsandbytes
from luthier.checkpoint.tensors import Stored, aligned
from luthier.errors import UserError

_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The values of four bits: a sign, two bits of exponent and one of fraction.
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_E8M0_BIAS = 127
_VALUES_AT_ONCE = 1 << 24


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a config.json, empty where the weights are plain."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def check(config: Mapping[str, Any], place: str) -> None:
    """Raise UserError where ``config`` names a method whose weights cannot be read."""
    found = settings(config)
    if found and found.get("quant_method") not in _READERS:
        method = found.get("quant_method", "an unknown method")
        raise UserError(
            f"{place}: quantised with {method}, which cannot be read. Give the unquantised checkpoint "
            f"(of the quantised kinds, {', '.join(_READERS)} can be read)."
        )


def as_floats(tensors: Mapping[str, Stored], config: Mapping[str, Any], place: Path) -> Mapping[str, Stored]:
    """Return ``tensors`` with each quantised weight and its scales replaced by one tensor of floats.

    The rest is untouched; values are computed when they are read. Raises UserError where scales are missing or do
    not fit.
    """
    found = settings(config)
    return _READERS[found["quant_method"]](tensors, config, place) if found else tensors


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` as it reads for plain weights."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if "quantization_config" in (plain.get("text_config") or {}):
        plain["text_config"] = without(plain["text_config"])
    return plain


def _read_fp8(tensors: Mapping[str, Stored], config: Mapping[str, Any], place: Path) -> dict[str, Stored]:
    block = settings(config).get("weight_block_size")
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype in _FP8:
            scale = tensors.get(f"{name}_scale_inv")
            if scale is None:
                raise UserError(f"{place}: {name} is fp8 without {name}_scale_inv. Download the checkpoint again.")
            rows, columns = block or tensor.shape[-2:]
            grid = (*tensor.shape[:-2], -(-tensor.shape[-2] // rows), -(-tensor.shape[-1] // columns))
            # One scale for a whole tensor is stored without dimensions, or with some of size one.
            if scale.shape != grid and (block or math.prod(scale.shape) != math.prod(grid)):
                raise UserError(
                    f"{place}: {name}_scale_inv has shape {scale.shape}, and {name} in blocks of {rows} x {columns} "
                    f"asks for {grid}. Download the checkpoint again."
                )
            read = partial(_fp8_values, tensor, scale, grid, (rows, columns))
            result[name] = Stored(tensor.shape, _BFLOAT16, read)
        elif not _is_fp8_setting(name, tensors):
            result[name] = tensor
    return result


def _is_fp8_setting(name: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether this tensor only says how another is stored: its scale, or the scale of the layer's inputs."""
    if name.endswith(".activation_scale"):
        return True
    weight = tensors.get(name.removesuffix("_scale_inv"))
    return name.endswith("_scale_inv") and weight is not None and weight.dtype in _FP8


def _fp8_values(tensor: Stored, scale: Stored, grid: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Multiply in fp32 and round once, some rows of blocks at a time so that no whole fp32 copy arises."""
    quantised, values = tensor.read(), aligned(tensor.shape, _BFLOAT16)
    scales = scale.read().astype(np.float32).reshape(grid)
    columns = quantised.shape[-1]
    step = max(1, _VALUES_AT_ONCE // (block[0] * columns))
    for lead in np.ndindex(tensor.shape[:-2]):
        for first in range(0, grid[-2], step):
            rows = slice(first * block[0], (first + step) * block[0])
            part = quantised[lead][rows].astype(np.float32)
            spread = scales[lead][first : first + step].repeat(block[0], 0)[: len(part)]
            part *= spread.repeat(block[1], 1)[:, :columns]
            values[lead][rows] = part
    return values


def _read_mxfp4(tensors: Mapping[str, Stored], config: Mapping[str, Any], place: Path) -> dict[str, Stored]:
    result = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem != name:
            scales = tensors.get(f"{stem}_scales")
            if scales is None or scales.shape != tensor.shape[:-1] or {tensor.dtype, scales.dtype} != {np.dtype("u1")}:
                raise UserError(
                    f"{place}: {name} {tensor.shape} has no {stem}_scales of bytes to fit it. Download the checkpoint "
                    "again."
                )
            *lead, rows, groups, size = tensor.shape
            shape = (*lead, groups * size * 2, rows)
            result[stem] = Stored(shape, _BFLOAT16, partial(_mxfp4_values, tensor, scales, shape))
        elif f"{name.removesuffix('_scales')}_blocks" not in tensors:
            result[name] = tensor
    return result


def _mxfp4_values(blocks: Stored, scales: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """Return one matrix after the other. They are stored by rows of outputs, and Transformers keeps inputs first."""
    packed, exponents, values = blocks.read(), scales.read(), aligned(shape, _BFLOAT16)
    for lead in np.ndindex(shape[:-2]):
        # The low half of a byte comes before the high one.
        numbers = _FP4[np.stack([packed[lead] & 15, packed[lead] >> 4], -1)]
        power = exponents[lead].astype(np.int32) - _E8M0_BIAS
        scaled = np.ldexp(numbers, power[..., None, None])
        values[lead] = scaled.reshape(len(scaled), -1).T
    return values


_READERS = {"fp8": _read_fp8, "mxfp4": _read_mxfp4, "bitsandbytes": bitsandbytes.read}

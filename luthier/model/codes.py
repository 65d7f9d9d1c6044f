"""A matrix in numpy to the codes and scales that stand for it.

Codes are those of bitsandbytes on a CPU, bit for bit, where it has the kind: LLM.int8()'s (arXiv 2208.07339), NF4 with
double quantisation (arXiv 2305.14314, section 3, with the eight-bit type of arXiv 2110.02861 for the second level).
``int4`` is the plain symmetric kind in the same blocks. All is done on the host, so that codes are the same whatever
the accelerator.

Left out on purpose: calibration by data (GPTQ, AWQ), and fp4, which is NF4 with a worse table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

BLOCK = 64
SECOND_BLOCK = 256

# The quantiles of a normal distribution, of the paper's appendix E.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# Codes 1 to 15 are -7 to 7; code 0 is never made.
INT4 = ((np.arange(16) - 8) / 7).astype(np.float32)
TABLES = {"nf4": NF4, "int4": INT4}

_VALUES_AT_ONCE = 1 << 16  # what stays in a core's own cache
_GRID = 1 << 16
_TINY = np.float32(1e-38)


def _dynamic() -> np.ndarray:
    """Return the 256 values of the signed eight-bit type with a dynamic exponent, in order (arXiv 2110.02861).

    Each of seven powers of ten has twice as many fractions as the one below it.
    """
    sides = [np.array([0.0, 1.0], np.float32)]
    for exponent in range(7):
        count = 1 << exponent
        steps = np.arange(count + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count))
        # From both ends to the middle, in fp32 with one rounding: so the bits are those of released checkpoints.
        ends = np.where(steps < (count + 1) / 2, np.float64(np.float32(0.1)) + step * steps, 1 - step * (count - steps))
        ends = ends.astype(np.float32)
        values = np.float32(10.0 ** (exponent - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        sides += [values, -values]
    return np.sort(np.concatenate(sides))


DYNAMIC = _dynamic()


def block_size(columns: int) -> int:
    """Return how many values share a scale: 64, or the greatest power of two below that divides ``columns``."""
    return math.gcd(BLOCK, columns)


def int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values int8 ``[out, in]`` and scales fp32 ``[out]``: 127 stands for a row's greatest magnitude."""
    values, scales = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)

    def rows(part: slice) -> None:
        floats = matrix[part].astype(np.float32)
        scales[part] = np.abs(floats).max(1)
        # A row of zeros has scale 0, and any code stands for 0 then.
        factor = np.float32(127) / np.where(scales[part] == 0, np.float32(1), scales[part])
        floats *= factor[:, None]
        values[part] = np.rint(floats, out=floats)

    _by_rows(rows, *matrix.shape)
    return values, scales


def four_bits(matrix: np.ndarray, table: str) -> tuple[np.ndarray, np.ndarray]:
    """Return codes uint8 ``[out, in / 2]``, the first of two in the high half, and scales ``[out, in / block]``."""
    out, columns = matrix.shape
    block = block_size(columns)
    codes = np.empty((out, columns // 2), np.uint8)
    scales = np.empty((out, columns // block), np.float32)
    bounds = (TABLES[table][:-1] + TABLES[table][1:]) / 2

    def rows(part: slice) -> None:
        floats = matrix[part].astype(np.float32).reshape(-1, columns // block, block)
        scales[part] = np.abs(floats).max(-1)
        floats *= (1 / np.maximum(scales[part], _TINY))[..., None]
        found = _symmetric(floats) if table == "int4" else _above(bounds, floats)
        codes[part] = (found[..., ::2] << 4 | found[..., 1::2]).reshape(len(found), -1)

    _by_rows(rows, out, columns)
    return codes, scales


def second_level(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Return codes uint8 in the shape of ``scales``, the scales fp32 of 256 of them each, and the offset.

    The offset is the mean, rounded once; bitsandbytes' own may differ in its last bit, by how torch adds.
    """
    offset = np.float32(scales.mean(dtype=np.float64))
    flat = np.zeros(-(-scales.size // SECOND_BLOCK) * SECOND_BLOCK, np.float32)
    flat[: scales.size] = scales.reshape(-1) - offset
    blocks = flat.reshape(-1, SECOND_BLOCK)
    second = np.abs(blocks).max(1)
    scaled = blocks * (1 / np.where(second == 0, np.float32(1), second))[:, None]
    codes = np.where(second[:, None] == 0, np.uint8(0), nearest_dynamic(scaled))
    return codes.reshape(-1)[: scales.size].reshape(scales.shape), second, offset


def nearest_dynamic(scaled: np.ndarray) -> np.ndarray:
    """Return the codes of numbers in [-1, 1], first rounded to a grid of 65536 as bitsandbytes rounds on a CPU."""
    places = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5)
    return _DYNAMIC_CODES[(places * np.float32(_GRID - 1) + np.float32(0.5)).astype(np.uint16)]


def _dynamic_codes() -> np.ndarray:
    grid = np.float32(-1) + np.float32(2) * np.arange(_GRID, dtype=np.float32) / np.float32(_GRID - 1)
    return np.searchsorted((DYNAMIC[:-1] + DYNAMIC[1:]) / 2, grid).astype(np.uint8)


_DYNAMIC_CODES = _dynamic_codes()


def _above(bounds: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Return how many of ``bounds`` lie below each number. A comparison with each is quicker than a search."""
    codes = np.zeros(scaled.shape, np.uint8)
    for bound in bounds:
        codes += scaled > bound
    return codes


def _symmetric(scaled: np.ndarray) -> np.ndarray:
    return (np.rint(scaled * np.float32(7)) + np.float32(8)).astype(np.uint8)


def _by_rows(work: Callable[[slice], Any], rows: int, columns: int) -> None:
    """Run ``work`` on slices of rows, small enough for the cache, in as many threads as there are cores."""
    step = max(1, _VALUES_AT_ONCE // columns)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(work, [slice(start, start + step) for start in range(0, rows, step)]))

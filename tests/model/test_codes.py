"""Codes and scales, against bitsandbytes where it is installed and against the papers' formulas everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.model import codes

SHAPES = [(64, 64), (96, 192), (5, 128), (300, 1024)]


def matrix(shape: tuple[int, int], kind: str = "normal", seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape, np.float32) * np.float32(0.02)
    if kind == "outliers":
        values[random.random(shape) < 0.01] *= 50
    if kind == "zeros":
        values[0] = 0
        values[-1, : shape[1] // 2] = 0
    return values


def theirs(values: np.ndarray):
    """bitsandbytes' functions, and the matrix in torch."""
    torch = pytest.importorskip("torch", reason="bitsandbytes is of torch")
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    return functional, torch.from_numpy(values.copy())


every_matrix = pytest.mark.parametrize("kind", ["normal", "outliers", "zeros"])
every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_shape
@every_matrix
def test_nf4_is_bitsandbytes_to_the_bit(shape: tuple[int, int], kind: str) -> None:
    values = matrix(shape, kind)
    functional, tensor = theirs(values)
    packed, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    ours, scales = codes.four_bits(values, "nf4")
    np.testing.assert_array_equal(ours.reshape(-1), packed.numpy().reshape(-1))
    np.testing.assert_array_equal(scales.reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(codes.NF4, state.code.numpy())


@every_shape
@every_matrix
def test_the_second_level_is_bitsandbytes_to_the_bit(shape: tuple[int, int], kind: str, monkeypatch) -> None:
    values = matrix(shape, kind)
    functional, tensor = theirs(values)
    _, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=True)
    _, scales = codes.four_bits(values, "nf4")
    _, _, offset = codes.second_level(scales)
    # torch adds the mean up in an order that depends on the machine: the last bit may be another.
    assert abs(offset - state.offset.item()) <= 2 * np.spacing(offset)
    given = _Mean(scales, np.float32(state.offset.item()))
    found, second, _ = codes.second_level(given)
    np.testing.assert_array_equal(found.reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(second, state.state2.absmax.numpy())
    np.testing.assert_array_equal(codes.DYNAMIC, state.state2.code.numpy())


class _Mean(np.ndarray):
    """An array that has bitsandbytes' mean."""

    def __new__(cls, values: np.ndarray, offset: np.float32) -> _Mean:
        array = values.view(cls)
        array.offset = offset
        return array

    def mean(self, **_) -> np.float32:
        return self.offset


@every_shape
@every_matrix
def test_int8_is_bitsandbytes_to_the_bit(shape: tuple[int, int], kind: str) -> None:
    values = matrix(shape, kind)
    functional, tensor = theirs(values)
    quantised, scales, _ = functional.int8_vectorwise_quant(tensor)
    ours, found = codes.int8(values)
    np.testing.assert_array_equal(found, scales.numpy())
    alive = found > 0  # of a row of zeros, 0 times infinity, bitsandbytes makes nothing that can be told
    np.testing.assert_array_equal(ours[alive], quantised.numpy()[alive])
    assert not ours[~alive].any()


@every_shape
@pytest.mark.parametrize("table", codes.TABLES)
@every_matrix
def test_four_bits_are_the_nearest_values(shape: tuple[int, int], table: str, kind: str) -> None:
    """The papers' rule, in double precision: the nearest value of the table, scaled by the block's greatest."""
    values = matrix(shape, kind)
    packed, scales = codes.four_bits(values, table)
    blocks = values.reshape(-1, 64).astype(np.float64)
    greatest = np.abs(blocks).max(1)
    np.testing.assert_array_equal(scales.reshape(-1), greatest.astype(np.float32))
    scaled = blocks / np.where(greatest == 0, 1, greatest)[:, None]
    distance = np.abs(scaled[..., None] - codes.TABLES[table].astype(np.float64))
    found = np.stack([packed >> 4, packed & 15], -1).reshape(blocks.shape)
    chosen = np.take_along_axis(distance, found[..., None], -1)[..., 0]
    assert (chosen <= distance.min(-1) + 1e-6).all()


@pytest.mark.parametrize("columns", [48, 20, 2, 192, 64])
def test_blocks_divide_rows(columns: int) -> None:
    """A block never crosses rows: rows of another width than 64's multiples have smaller ones."""
    block = codes.block_size(columns)
    assert columns % block == 0
    assert block == max(size for size in (1, 2, 4, 8, 16, 32, 64) if columns % size == 0)
    whole, scales = codes.four_bits(matrix((7, columns)), "nf4")
    assert (whole.shape, scales.shape) == ((7, columns // 2), (7, columns // block))
    for row in range(7):
        one, own = codes.four_bits(matrix((7, columns))[row : row + 1], "nf4")
        np.testing.assert_array_equal(one[0], whole[row])
        np.testing.assert_array_equal(own[0], scales[row])


def test_codes_by_hand() -> None:
    """Two values of NF4's table at a scale of 2, the first in the high half of a byte; -7 and 7 of int4."""
    values = np.zeros((1, 64), np.float32)
    values[0, :4] = 2 * codes.NF4[[15, 0, 3, 12]]
    packed, scales = codes.four_bits(values, "nf4")
    assert packed[0, :3].tolist() == [0xF0, 0x3C, 0x77]
    assert scales.tolist() == [[2.0]]
    values[0, :4] = [14, -14, 4, -6]
    packed, scales = codes.four_bits(values, "int4")
    assert packed[0, :3].tolist() == [0xF1, 0xA5, 0x88]
    assert scales.tolist() == [[14.0]]


def test_bfloat16_is_quantised_as_its_values_are() -> None:
    import ml_dtypes

    rough = matrix((8, 64)).astype(ml_dtypes.bfloat16)
    for ours, exact in (
        (codes.four_bits(rough, "nf4"), codes.four_bits(rough.astype(np.float32), "nf4")),
        (codes.int8(rough), codes.int8(rough.astype(np.float32))),
    ):
        for one, other in zip(ours, exact, strict=True):
            np.testing.assert_array_equal(one, other)

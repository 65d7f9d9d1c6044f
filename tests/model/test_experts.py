"""The matmul of many experts against one matmul an expert: values, gradients, types, and how much work it is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import TOLERANCE, assert_close

from luthier.model import experts
from luthier.model.experts import grouped

SIZES = {
    "even": [8, 8, 8, 8],
    "uneven": [1, 0, 30, 1],
    "one": [0, 32, 0, 0],
    "none": [0, 0, 0, 0],
    "rows of no expert": [3, 11, 0, 5],
}


def arrays(sizes: list[int], dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    x_MI, w_EIO = jax.random.normal(keys[0], (32, 12)), jax.random.normal(keys[1], (4, 12, 20))
    return x_MI.astype(dtype), w_EIO, jnp.array(sizes, jnp.int32), jax.random.normal(keys[2], (32, 20)).astype(dtype)


def one_by_one(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    ends = np.cumsum(sizes_E)
    parts = [x_MI[end - size : end] @ w_IO for end, size, w_IO in zip(ends, np.asarray(sizes_E), w_EIO, strict=True)]
    return jnp.concatenate([*parts, jnp.zeros((len(x_MI) - ends[-1], w_EIO.shape[2]), x_MI.dtype)])


def with_gradients(function, x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, g_MO: jax.Array):
    y_MO, pull = jax.vjp(lambda x, w: function(x, w, sizes_E), x_MI, w_EIO)
    return y_MO, *pull(g_MO.astype(y_MO.dtype))


def by_instruction(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, g_MO: jax.Array):
    return (
        experts.ragged_forward(x_MI, w_EIO, sizes_E),
        *experts.ragged_backward(x_MI, w_EIO, sizes_E, g_MO),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("function", [functools.partial(with_gradients, grouped), by_instruction], ids=["tiles", "xla"])
def test_values_and_gradients_equal_one_matmul_an_expert(function, sizes: list[int], dtype: str) -> None:
    x_MI, w_EIO, sizes_E, g_MO = arrays(sizes, dtype)
    theirs = with_gradients(one_by_one, x_MI.astype(jnp.float32), w_EIO, sizes_E, g_MO.astype(jnp.float32))
    for one, other in zip(jax.jit(function)(x_MI, w_EIO, sizes_E, g_MO), theirs, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_few_rows_are_multiplied_too(rows: int) -> None:
    x_MI, w_EIO, _, _ = arrays(SIZES["even"])
    sizes_E = jnp.array([0, 1, 0, rows - 1])
    assert_close(grouped(x_MI[:rows], w_EIO, sizes_E), one_by_one(x_MI[:rows], w_EIO, sizes_E))


def test_each_result_has_its_own_type() -> None:
    x_MI, w_EIO, sizes_E, g_MO = arrays(SIZES["even"], "bfloat16")
    y_MO, dx_MI, dw_EIO = with_gradients(grouped, x_MI, w_EIO, sizes_E, g_MO)
    assert (y_MO.dtype, dx_MI.dtype, dw_EIO.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert with_gradients(grouped, x_MI, w_EIO.astype(jnp.bfloat16), sizes_E, g_MO)[2].dtype == jnp.bfloat16


def test_the_gradient_of_an_fp32_weight_is_summed_in_fp32() -> None:
    """4,096 equal products: a bf16 sum would stall, and a bf16 result round, near 4,104.5."""
    x_MI, w_EIO = jnp.ones((8192, 2), jnp.bfloat16), jnp.zeros((2, 2, 3))
    g_MO = jnp.full((8192, 3), 1.0078125, jnp.bfloat16)
    _, _, dw_EIO = with_gradients(grouped, x_MI, w_EIO, jnp.array([4096, 4096]), g_MO)
    np.testing.assert_array_equal(dw_EIO, np.full((2, 2, 3), 4096 * 1.0078125))


@pytest.mark.parametrize(("rows", "number"), [(64, 4), (512, 16), (4096, 16), (33, 128)])
def test_the_work_is_that_of_the_rows_and_not_of_all_experts(rows: int, number: int) -> None:
    chosen = np.random.default_rng(0).integers(0, number, rows)
    sizes_E = jnp.bincount(jnp.array(chosen), length=number)
    _, tiles = experts._over_tiles(
        lambda carry, *_: (carry[0], carry[1] + 1), (jnp.zeros((rows, 1)), jnp.int32(0)), sizes_E
    )
    size = experts.tile_rows(rows, number)
    assert int(tiles) == sum(-(-int(count) // size) for count in sizes_E)
    assert int(tiles) * size <= 1.5 * rows + size * min(rows, number)

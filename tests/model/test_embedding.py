"""Rows of an embedding that is split over devices: the same numbers as from a whole one, and little sent for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.model import embedding

V, D, B, T = 64, 32, 16, 8
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "context": 2},
]


def placed(axes: tuple[str, ...], array: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.device_put(array, mesh_lib.sharding(axes, array.shape, mesh))


def loss(table_VD: jax.Array, ids_BT: jax.Array, factors_BTD: jax.Array) -> jax.Array:
    x_BTD = mesh_lib.constrain(embedding.rows(table_VD, ids_BT, jnp.float32), "batch", "time", "norm")
    return jnp.sum(jnp.sin(x_BTD) * factors_BTD)


@functools.cache
def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    numbers = np.random.default_rng(0)
    table_VD, factors_BTD = (numbers.standard_normal(shape, np.float32) for shape in ((V, D), (B, T, D)))
    return jnp.asarray(table_VD), jnp.asarray(numbers.integers(0, V, (B, T))), jnp.asarray(factors_BTD)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_and_their_gradient_are_those_of_a_whole_embedding(sizes):
    table_VD, ids_BT, factors_BTD = arrays()
    whole, gradient_VD = jax.value_and_grad(loss)(table_VD, ids_BT, factors_BTD)
    mesh = mesh_lib.make(ModelKeys(**{f"ici_{axis}_parallelism": size for axis, size in ({"fsdp": 1} | sizes).items()}))
    with mesh_lib.use(mesh):
        split = (
            placed(("vocab", "embed"), table_VD, mesh),
            placed(("batch", "time"), ids_BT, mesh),
            placed(("batch", "time", "norm"), factors_BTD, mesh),
        )
        ours, ours_VD = jax.jit(jax.value_and_grad(loss))(*split)
    np.testing.assert_allclose(ours, whole, rtol=1e-5)
    np.testing.assert_allclose(ours_VD, gradient_VD, atol=1e-5)


def test_rows_that_devices_cannot_share_out_are_looked_up_all_the_same():
    table_VD, ids_BT, _ = arrays()
    mesh = mesh_lib.make(ModelKeys(ici_fsdp_parallelism=8))
    with mesh_lib.use(mesh):
        x_BTD = jax.jit(lambda w, ids: embedding.rows(w, ids, jnp.float32))(
            placed(("vocab", "embed"), table_VD, mesh), ids_BT[:3, :1]
        )
    np.testing.assert_array_equal(x_BTD, table_VD[ids_BT[:3, :1]])

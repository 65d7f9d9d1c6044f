import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import keys, one_device
from jax.sharding import NamedSharding, PartitionSpec

from luthier import mesh as mesh_lib
from luthier.checkpoint import checksums

KINDS = ("float32", "bfloat16", "int8", "uint8", "bool", "int32")
SHAPES = {"scalar": (), "vector": (16,), "matrix": (16, 24), "stacked": (3, 16, 8, 5)}
LARGE = {"vector": (1_200_000,), "matrix": (1504, 800), "stacked": (3, 16, 40, 625)}


def drawn(shape, kind):
    return (np.random.default_rng(0).standard_normal(shape) * 3).astype(jnp.dtype(kind))


def sharded(values, *over):
    mesh = mesh_lib.make(keys(ici_fsdp_parallelism=4, ici_tensor_parallelism=2))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*over)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_checksum_does_not_depend_on_the_devices(name, kind):
    values = drawn(SHAPES[name], kind)
    one = checksums.of({"x": jax.device_put(values, NamedSharding(one_device(), PartitionSpec()))})
    assert checksums.of({"x": sharded(values)}) == checksums.of({"x": jnp.asarray(values)}) == one
    if values.ndim:
        axis = 1 if values.ndim > 2 else 0
        assert checksums.of({"x": sharded(values, *[None] * axis, ("fsdp", "tensor"))}) == one
    if values.ndim > 1:
        assert (
            checksums.of({"x": sharded(values, *[None] * (values.ndim - 2), "fsdp" if values.ndim == 2 else None)})
            == one
        )


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_devices_find_what_the_host_finds(name, kind, monkeypatch):
    values = drawn(LARGE[name], kind)
    axis = 1 if values.ndim > 2 else 0
    on_devices = [
        checksums.of({"x": array})
        for array in (jnp.asarray(values), sharded(values), sharded(values, *[None] * axis, "tensor"))
    ]
    monkeypatch.setattr(checksums, "_SMALL", values.size)
    assert [checksums.of({"x": jnp.asarray(values)})] * 3 == on_devices


@pytest.mark.parametrize("name", SHAPES)
def test_every_bit_of_every_element_counts(name):
    values = drawn(SHAPES[name], "float32")
    whole = checksums.of({"x": jnp.asarray(values)})
    for bit in range(32):
        for element in range(values.size):
            changed = values.copy().reshape(-1)
            changed.view(np.uint32)[element] ^= np.uint32(1 << bit)
            assert checksums._sum(np, changed.reshape(values.shape), [0] * values.ndim) != whole["x"]
        if bit == 3 and values.size > 100:
            break


def test_elements_that_change_places_show():
    values = drawn((16, 24), "float32")
    whole = checksums.of({"x": jnp.asarray(values)})
    for other in (values[::-1], values[:, ::-1], np.roll(values, 1), values.reshape(24, 16), -values):
        assert checksums.of({"x": jnp.asarray(other)}) != whole

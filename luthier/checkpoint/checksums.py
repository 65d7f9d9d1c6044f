"""Checksums of arrays, taken where the arrays lie: on the devices, before they are saved and after they are restored.

One covers the whole way from device to disk to device, whatever wrote the bytes and however they were split, so that a
checkpoint may be restored on other devices than it was saved from. Orbax has them for its small index files alone:
bits flipped in the data of arrays came back as weights.

Each word is joined with its place in the whole array and mixed by the finaliser of MurmurHash3 (Austin Appleby, public
domain), which maps 32 bits to 32 bits one to one: one changed word always shows, and more of them but for one time in
2^32. The sum over the words does not depend on their order, and so not on how devices share them.

Left out on purpose: protection against somebody who means to deceive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_STRIDE = 0x9E3779B1  # odd, so that places differ
_SMALL = 1 << 18  # elements up to which numpy is done before a program would be compiled


def of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Return the checksum of each array; every process calls it with the same names."""
    parts = [_parts(array) for array in arrays.values()]  # all are started, then awaited
    sums = np.array([sum(int(np.asarray(part).item()) for part in own) % 2**32 for own in parts], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    return dict(zip(arrays, sums.tolist(), strict=True))


def _parts(array: jax.Array) -> list[Any]:
    """Return the sum of each part of the array that lies here: numbers, or promises of them where parts are large."""
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if math.prod(array.sharding.shard_shape(array.shape)) <= _SMALL:
        return [_sum(np, np.asarray(shard.data), [where.start or 0 for where in shard.index]) for shard in own]
    # Also where no first copy lies: a program over all devices is one that every process starts.
    sums = {shard.device: shard.data for shard in _sums(array).addressable_shards}
    return [sums[shard.device] for shard in own]


def _sums(array: jax.Array) -> jax.Array:
    """Return the sum of each device's part, by one program for all devices."""
    if not isinstance(array.sharding, NamedSharding):
        return _sum_large(array, jnp.zeros((1, array.ndim), jnp.uint32))
    mesh = array.sharding.mesh
    each = NamedSharding(mesh, P(mesh.axis_names))
    places = array.sharding.addressable_devices_indices_map(array.shape)
    rows = {device: [[where.start or 0 for where in place or ()]] for device, place in places.items()}
    starts = jax.make_array_from_single_device_arrays(
        (mesh.size, array.ndim),
        each,
        [jax.device_put(np.array(row, np.uint32), device) for device, row in rows.items()],
    )
    return _on_each(array, starts, array.sharding)


@partial(jax.jit, static_argnums=2)
def _on_each(array: jax.Array, starts: jax.Array, sharding: NamedSharding) -> jax.Array:
    each = P(sharding.mesh.axis_names)
    return jax.shard_map(_sum_large, mesh=sharding.mesh, in_specs=(sharding.spec, each), out_specs=each)(array, starts)


@jax.jit
def _sum_large(array: jax.Array, starts: jax.Array) -> jax.Array:
    """Go through the first axis, which XLA makes one pass of: a CPU takes ten times as long to reduce integers."""
    array = array if array.ndim > 1 else array[None]
    first, *rest = [jnp.uint32(0)] * (array.ndim - starts.shape[1]) + list(starts[0])

    def add(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        words = _words(jnp, jax.lax.dynamic_index_in_dim(array, row, keepdims=False))
        return total + _mixed(jnp, words ^ _places(jnp, words.shape, row + first, rest)), None

    rows = jnp.arange(array.shape[0], dtype=jnp.uint32)
    total = add(jnp.uint32(0), rows[0])[0]
    return jax.lax.scan(add, total, rows[1:])[0].sum(dtype=jnp.uint32)[None]


def _sum(xp: Any, array: Any, starts: Any) -> Any:
    words = _words(xp, array[None])  # numpy warns of the overflow that is meant where there is no axis
    return _mixed(xp, words ^ _places(xp, words.shape, xp.uint32(0), [0, *starts])).sum(dtype=xp.uint32)


def _words(xp: Any, array: Any) -> Any:
    """Return the bits of each element as a 32-bit word."""
    return array.view(xp.dtype(f"uint{array.dtype.itemsize * 8}")).astype(xp.uint32)


def _places(xp: Any, shape: tuple[int, ...], lead: Any, starts: Any) -> Any:
    """Return a number for each place of a block that begins at ``starts`` in an array, or in its row ``lead``."""
    place = lead
    for axis, (size, start) in enumerate(zip(shape, starts, strict=True)):
        along = xp.arange(size, dtype=xp.uint32) + xp.uint32(start)
        place = place * xp.uint32(_STRIDE) + along.reshape(-1, *[1] * (len(shape) - 1 - axis))
    return place


def _mixed(xp: Any, word: Any) -> Any:
    word = (word ^ (word >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    word = (word ^ (word >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return word ^ (word >> xp.uint32(16))

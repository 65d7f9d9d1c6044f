"""Rows cut over the mesh's ``context`` axis: which of a row's tokens lie on which device.

The last tokens of a causal row see more than its first ones. So a row is cut into twice as many pieces as there are
devices, and device i has the i-th from the front and the i-th from the back: then all have as much work (Llama 3, arXiv
2407.21783, section 3.3.2). A row lies so inside the decoder alone; what goes in and comes out is in the row's own
order, and of any length, since rows are padded at their end inside.

Left out on purpose: rows whose tokens differ in work for another reason, as where segments are short.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from luthier import mesh as mesh_lib
from luthier.model.segments import Segments

AXIS = "context"


def ways() -> int:
    """Return over how many devices of the mesh in use a row is cut."""
    mesh = mesh_lib.current()
    return 1 if mesh is None else mesh.shape[AXIS]


def order(length: int, ways: int) -> np.ndarray:
    """Return ``[T]``: which token of a row of ``length`` tokens, twice ``ways`` a divisor, lies at each place."""
    pieces = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.stack([pieces[:ways], pieces[::-1][:ways]], axis=1).reshape(-1)


def spread(x: jax.Array, axis: int = 1, *, repeat_last: bool = False) -> jax.Array:
    """Return an array with its time axis padded and in the order of ``order``.

    It is padded with zeros, or with its last entry.
    """
    length, count = x.shape[axis], ways()
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -length % (2 * count))
    x = jnp.pad(x, pad, mode="edge" if repeat_last else "constant")
    return jnp.take(x, order(x.shape[axis], count), axis=axis)


def spread_segments(segments: Segments, tokens_BT: jax.Array) -> Segments:
    """Return the segments of rows ``tokens_BT`` as ``spread`` does, that of the padding 0."""
    if segments is None and tokens_BT.shape[1] % (2 * ways()):
        segments = jnp.ones(tokens_BT.shape, jnp.int32)
    return jax.tree.map(spread, segments)


def natural(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
    """Undo ``spread``: for small arrays, since a device may get all of it."""
    places = np.argsort(order(x.shape[axis], ways()))[:length]
    return jnp.take(x, places, axis=axis)


def restored(x_BTD: jax.Array, length: int) -> jax.Array:
    """Undo ``spread``, each piece travelling from its one device to the other."""
    mesh = mesh_lib.current()
    assert mesh is not None
    placed = mesh_lib.partition(("batch", "time", "norm"), x_BTD.shape, mesh)
    exchange = functools.partial(_exchanged, mesh.shape[AXIS])
    whole_BTD = jax.shard_map(exchange, mesh=mesh, in_specs=placed, out_specs=placed, check_vma=False)(x_BTD)
    return whole_BTD[:, :length]


def _exchanged(count: int, x_BtD: jax.Array) -> jax.Array:
    """Return this device's pieces 2i and 2i + 1 of a row. Of its pieces i and 2 * count - 1 - i, one is even."""
    first, second = jnp.split(x_BtD, 2, axis=1)
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    pieces = (jnp.where(is_even, first, second), jnp.where(is_even, second, first))
    held = [sorted((i, 2 * count - 1 - i), key=lambda piece: piece % 2) for i in range(count)]
    travels = ([(i, pair[parity] // 2) for i, pair in enumerate(held)] for parity in (0, 1))
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, to) for x, to in zip(pieces, travels, strict=True)], axis=1)


def own_places(length: int) -> jax.Array:
    """Return, inside ``shard_map``, which tokens ``[t]`` of a row of ``length`` lie on this device."""
    count, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    size = length // (2 * count)
    tokens = jnp.arange(size, dtype=jnp.int32)
    return jnp.concatenate([me * size + tokens, (2 * count - 1 - me) * size + tokens])


def gathered(x: jax.Array) -> jax.Array:
    """Return, inside ``shard_map``, the whole rows ``[B, T, ...]``, in their own order, of which ``x`` has a part."""
    count, (B, t, *rest) = jax.lax.axis_size(AXIS), x.shape
    pieces = jax.lax.all_gather(x, AXIS, axis=1).reshape(B, count, 2, t // 2, *rest)
    return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(B, count * t, *rest)


def scattered(x: jax.Array) -> jax.Array:
    """Return, inside ``shard_map``, this device's part of rows ``[B, T, ...]``, summed over devices."""
    count, (B, T, *rest) = jax.lax.axis_size(AXIS), x.shape
    pieces = x.reshape(B, 2, count, -1, *rest)
    pieces = jnp.stack([pieces[:, 0], pieces[:, 1, ::-1]], axis=2)  # [B, count, 2, piece, ...]
    mine = jax.lax.psum_scatter(pieces, AXIS, scatter_dimension=1)
    return mine.reshape(B, T // count, *rest)

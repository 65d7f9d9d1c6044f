"""Slices of weights from the host to the devices and back: into stacked, sharded arrays, quantised on the way or not.

One slice passes at a time, so that a model's whole weights are never on the host, nor its floats anywhere where it is
quantised. Of floats a process reads only what its own devices hold. Left out on purpose: where slices come from and go
to (``huggingface``), and reading parts of what is quantised, whose scales are of whole matrices.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.checkpoint import tensors as files
from luthier.checkpoint.tensors import Stored
from luthier.model import param as param_lib
from luthier.model import quant
from luthier.model.param import Param, Tree

Arrow = tuple[str, tuple[tuple[str, int], ...]]
"""An einops arrow, and the sizes that it needs to know."""
Spans = tuple[tuple[int, int], ...]
"""From where to where, in each dimension."""
_PIECE = 1 << 26
"""Bytes of a tensor that are read at once."""
_PART = 1 << 28
"""Bytes of a tensor that the devices are given at once."""


def structure(spec: Tree) -> Any:
    """Return the tree of the model's weights, each of which is a leaf, whatever its type."""
    return jax.tree.structure(param_lib.map_spec(lambda _: 0, spec))


def empty(spec: Tree, quantization: str, dtype: Any, mesh: Mesh) -> Tree:
    """Return weights of zeros as ``quant.abstract`` describes them."""
    shapes = quant.abstract(spec, quantization, dtype, mesh)
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
    )()


def put(weight: Any, param: Param, index: tuple[int, ...], piece: np.ndarray) -> Any:
    """Return ``weight`` with its slice at ``index`` set to ``piece``; what it was before is used up."""
    parts = quant.quantised(param, piece, quant.kind(weight))
    placed = jax.tree.map(partial(_placed, len(index)), weight, parts)
    shardings = jax.tree.map(lambda array: array.sharding, weight)
    return jax.block_until_ready(_write(weight, placed, index, shardings))


def fill(weight: jax.Array, param: Param, index: tuple[int, ...], stored: Stored) -> jax.Array:
    """Return ``weight``, which is used up, with its slice at ``index`` read from ``stored``, which can be cut.

    Each device is given its own part, and no more of the tensor is read than the devices here hold.
    """
    whole = cast(NamedSharding, weight.sharding)
    way = _as_stored(param, stored, whole.spec[len(index) :]) or _as_ours(param, stored, whole.spec[len(index) :])
    sharding, shape = NamedSharding(whole.mesh, P(*way.over)), way.shape
    # Along an axis that is whole on every device a big tensor is gone in parts, so that it is not there a second time.
    local = sharding.shard_shape(shape)
    axis = next((axis for axis in (way.slowest, *range(len(shape))) if local[axis] == shape[axis]), None)
    step = shape[axis := way.slowest] if axis is None else way.step(axis, _PART)
    for start in range(0, shape[axis], step):
        gc.collect(0)  # with which jax lets go of what the last part was read into
        offset = tuple(start if each == axis else 0 for each in range(len(shape)))
        part = (*shape[:axis], min(step, shape[axis] - start), *shape[axis + 1 :])
        piece = _piece(way, weight.dtype, sharding, offset, part)
        weight = jax.block_until_ready(_write(weight, piece, (*index, *way.place(offset)), whole, way.arrow))
    return weight


class _Way(NamedTuple):
    """How a tensor comes to the devices: in the order of a file, of shape ``shape``, or of ours.

    ``over`` says over which axes of the mesh each dimension is split, ``slowest`` which one runs slowest in the file,
    ``units`` in which steps each may be gone along, ``bytes_`` is the tensor's size. ``read(box)`` brings a box of it,
    ``place`` turns where a part of it begins into where ours does, and ``arrow`` is what the devices make ours by.
    """

    shape: tuple[int, ...]
    over: tuple[Any, ...]
    slowest: int
    units: tuple[int, ...]
    bytes_: int
    read: Callable[[Sequence[slice]], np.ndarray]
    place: Callable[[tuple[int, ...]], tuple[int, ...]]
    arrow: Arrow | None

    def step(self, axis: int, most: int) -> int:
        """Return how far to go along ``axis`` at once, for ``most`` bytes or one unit."""
        unit = self.units[axis]
        return max(1, most // (self.bytes_ * unit // self.shape[axis] + 1)) * unit


def _as_stored(param: Param, stored: Stored, over: Sequence[Any]) -> _Way | None:
    """The devices turn it around, which they do faster: where it is all of its tensor, and split as that can be."""
    sizes, split = (dict(zip(param.names, each, strict=True)) for each in (param.slice_shape, over))
    inner = [name for side in param.sides for name in side[1:]]
    if param.part is not None or any(split[name] for name in inner):
        return None
    firsts = [side[0] for side in param.sides]
    units = tuple(math.prod(sizes[name] for name in side[1:]) for side in param.sides)

    def place(offset: tuple[int, ...]) -> tuple[int, ...]:
        starts = {name: start // unit for name, start, unit in zip(firsts, offset, units, strict=True)}
        return tuple(starts.get(name, 0) for name in param.names)

    arrow = (param.layout, tuple((name, sizes[name]) for name in inner))
    axes = tuple(split[name] for name in firsts)
    assert stored.cut is not None
    return _Way(stored.shape, axes, 0, units, stored.nbytes, stored.cut, place, arrow)


def _as_ours(param: Param, stored: Stored, over: Sequence[Any]) -> _Way:
    """The host turns it around."""
    cut = stored.cut
    assert cut is not None

    def read(box: Sequence[slice]) -> np.ndarray:
        return param.from_block(cut(param.block(box)), box)

    shape, slowest = param.slice_shape, param.names.index(param.sides[0][0])
    return _Way(shape, tuple(over), slowest, (1,) * len(shape), stored.nbytes, read, lambda offset: offset, None)


def _piece(
    way: _Way, dtype: Any, sharding: NamedSharding, offset: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """Return the part of a slice that begins at ``offset``, as the devices here hold it."""
    here = sharding.addressable_devices_indices_map(shape)
    places = {device: _spans(where, shape, offset) for device, where in here.items()}
    parts = _parts(way, dtype, set(places.values()))
    arrays = jax.device_put([parts[place] for place in places.values()], list(places))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def take(array: Any, index: tuple[int, ...]) -> np.ndarray:
    """Return one slice of a weight, gathered from all devices; every process calls it.

    Of a quantised one it is the fp32 floats that it stands for.
    """
    if quant.kind(array):
        parts = jax.tree.map(partial(take, index=index), array)
        return np.asarray(_floats(parts).addressable_data(0))
    if index or not array.is_fully_replicated:  # else it is here as it is, and needs no copy
        array = _slice(array, index, NamedSharding(cast(NamedSharding, array.sharding).mesh, P()))
    return np.asarray(array.addressable_data(0))


@jax.jit
def _floats(weight: quant.Quantised) -> jax.Array:
    return weight.materialised(jnp.float32)


def quantise(params: Tree, spec: Tree, quantization: str, mesh: Mesh) -> Tree:
    """Return weights that are arrays as ``quantization`` has them; those that stay floats are the arrays themselves."""
    tree = structure(spec)
    arrays, declared = tree.flatten_up_to(params), list(param_lib.leaves(spec).values())
    weights = tree.flatten_up_to(empty(spec, quantization, jnp.float32, mesh))
    return jax.tree.unflatten(tree, map(_filled, weights, declared, arrays))


def random(spec: Tree, key: jax.Array, quantization: str, dtype: Any, mesh: Mesh) -> Tree:
    """Return random weights as ``quant.abstract`` describes them, drawn as ``param.initialise`` does, one by one."""
    tree, declared = structure(spec), list(param_lib.leaves(spec).values())
    weights = tree.flatten_up_to(empty(spec, quantization, dtype, mesh))
    for number, (param, own) in enumerate(zip(declared, jax.random.split(key, len(declared)), strict=True)):
        kind = jnp.float32 if quant.kind(weights[number]) else weights[number].dtype
        drawn = param_lib.initialise({"weight": param}, own, kind, mesh)["weight"]
        weights[number] = _filled(weights[number], param, drawn)
    return jax.tree.unflatten(tree, weights)


def _filled(weight: Any, param: Param, array: jax.Array) -> Any:
    if not quant.kind(weight):
        return array
    for index in np.ndindex(param.shape[: len(param.stack)]):
        weight = put(weight, param, index, take(array, index))
    return weight


def _spans(where: Any, shape: tuple[int, ...], offset: tuple[int, ...]) -> Spans:
    ends = (each.indices(size)[:2] for each, size in zip(where, shape, strict=True))
    return tuple((first + start, last + start) for (first, last), start in zip(ends, offset, strict=True))


def _box(places: set[Spans]) -> Spans:
    """Return the smallest box around all of these."""
    return tuple(
        (min(start for start, _ in spans), max(stop for _, stop in spans)) for spans in zip(*places, strict=True)
    )


def _size(box: Spans) -> int:
    return math.prod(stop - start for start, stop in box)


def _parts(way: _Way, dtype: Any, places: set[Spans]) -> dict[Spans, np.ndarray]:
    """Return {where: its values}, read in one box around all of them where that is not much more."""
    parts = {place: files.aligned(tuple(stop - start for start, stop in place), dtype) for place in places}
    groups = [places] if _size(_box(places)) <= 2 * sum(map(_size, places)) else [{place} for place in places]
    for group in groups:
        _read(way, _box(group), {place: parts[place] for place in group})
    return parts


def _read(way: _Way, whole: Spans, parts: dict[Spans, np.ndarray]) -> None:
    """Read a box in pieces along the tensor's slowest dimension: runs of the file where rows are whole."""
    box, along = list(whole), way.slowest
    first, last = box[along]
    step = way.step(along, _PIECE)
    for start in range(first, last, step):
        box[along] = (start, min(start + step, last))
        _copy(way.read([slice(*span) for span in box]), box, parts)


def _copy(piece: np.ndarray, box: Sequence[tuple[int, int]], parts: dict[Spans, np.ndarray]) -> None:
    """Copy what was read of ``box`` into those ``parts`` that it meets."""
    for place, part in parts.items():
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(place, box, strict=True)]
        if all(start < stop for start, stop in common):
            np.copyto(part[_within(place, common)], piece[_within(box, common)], casting="unsafe")


def _within(whole: Sequence[tuple[int, int]], part: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start - first, stop - first) for (first, _), (start, stop) in zip(whole, part, strict=True))


def _placed(stack: int, array: jax.Array, piece: np.ndarray) -> jax.Array:
    """Each device takes its own part of the host's ``piece``, in the memory order and type that it will have there."""

    def part(where: Any) -> np.ndarray:
        values = piece[where]
        if values.dtype == array.dtype and values.flags.c_contiguous:
            return values
        copy = files.aligned(values.shape, array.dtype)
        np.copyto(copy, values, casting="unsafe")
        return copy

    whole = cast(NamedSharding, array.sharding)
    return jax.make_array_from_callback(piece.shape, NamedSharding(whole.mesh, P(*whole.spec[stack:])), part)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write(weight: Any, pieces: Any, index: tuple[int, ...], shardings: Any, arrow: Arrow | None = None) -> Any:
    """Write one slice in place, or the part of one that begins at the rest of ``index``.

    ``arrow`` turns the piece around first. Arrays made so may be donated later, which the host's own memory may not.
    """

    def write(array: jax.Array, piece: jax.Array, sharding: NamedSharding) -> jax.Array:
        if arrow is not None:
            piece = einops.rearrange(piece, arrow[0], **dict(arrow[1]))
        piece = jnp.expand_dims(piece, tuple(range(array.ndim - piece.ndim)))
        array = jax.lax.dynamic_update_slice(array, piece, (*index, *[0] * (array.ndim - len(index))))
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree.map(write, weight, pieces, shardings)


@partial(jax.jit, static_argnums=2)
def _slice(array: jax.Array, index: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Return one slice, whole on every device."""
    for place in index:
        array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
    return jax.lax.with_sharding_constraint(array, sharding)

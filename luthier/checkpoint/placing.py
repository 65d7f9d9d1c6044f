"""Slices of weights from the host to the devices and back: into stacked, sharded arrays, quantised on the way or not.

One slice passes at a time, so that a model's whole weights are never on the host, nor its floats anywhere where it is
quantised. Left out on purpose: where slices come from and go to (``huggingface``).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.checkpoint import tensors as files
from luthier.model import param as param_lib
from luthier.model import quant
from luthier.model.param import Param, Tree


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


def take(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """Return one slice of an array, gathered from all devices; every process calls it."""
    if index or not array.is_fully_replicated:  # else it is here as it is, and needs no copy
        array = _slice(array, index, NamedSharding(cast(NamedSharding, array.sharding).mesh, P()))
    return np.asarray(array.addressable_data(0))


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


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(weight: Any, pieces: Any, index: tuple[int, ...], shardings: Any) -> Any:
    """Write one slice in place. Arrays made so may be donated later, which the host's own memory may not."""

    def write(array: jax.Array, piece: jax.Array, sharding: NamedSharding) -> jax.Array:
        piece = jnp.expand_dims(piece, tuple(range(len(index))))
        array = jax.lax.dynamic_update_slice(array, piece, (*index, *[0] * (piece.ndim - len(index))))
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree.map(write, weight, pieces, shardings)


@partial(jax.jit, static_argnums=2)
def _slice(array: jax.Array, index: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Return one slice, whole on every device."""
    for place in index:
        array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
    return jax.lax.with_sharding_constraint(array, sharding)

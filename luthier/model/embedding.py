"""Rows of the embedding, looked up where they lie.

The embedding's columns are split over devices that have other rows of the batch. Those exchange what is little: each
gets the tokens of all of them, looks up its own columns, and gives back to each what is that one's. Left to itself, the
compiler gathers the whole batch on every device where the mesh has a further axis.

Left out on purpose: quantised embeddings, which ``quant`` looks up.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier.model import quant


def rows(embedding_VD: Any, ids_BT: jax.Array, dtype: Any, time: str = "time") -> jax.Array:
    """Return the rows of the embedding ``[B, T, D]`` in ``dtype``; the embedding is an array or quantised.

    ``time`` is the logical axis that the ids' second one is.
    """
    mesh = mesh_lib.current()
    if mesh is None or mesh.size == 1 or not isinstance(embedding_VD, jax.Array):
        return quant.rows(embedding_VD, ids_BT, dtype)
    tokens = mesh_lib.partition(("batch", time), ids_BT.shape, mesh)
    table = mesh_lib.partition(("vocab", "embed"), embedding_VD.shape, mesh)
    vocab, embed = (_names(entry) for entry in table)
    dimensions = {name: dimension for dimension, entry in enumerate(tokens) for name in _names(entry)}
    if any(name not in dimensions for name in embed):  # rows that cannot be split are whole on each device
        return quant.rows(embedding_VD, ids_BT, dtype)
    exchanged = tuple((name, dimensions[name]) for name in embed)
    look_up = functools.partial(_local_rows, mesh, vocab, exchanged, dtype)
    return jax.shard_map(look_up, mesh=mesh, in_specs=(table, tokens), out_specs=tokens)(embedding_VD, ids_BT)


def _local_rows(
    mesh: Mesh, vocab: tuple[str, ...], exchanged: tuple[tuple[str, int], ...], dtype: Any, table_VD: Any, ids_BT: Any
) -> jax.Array:
    """Look up this device's columns for the tokens of all that it shares the embedding with, and exchange them."""
    for name, dimension in exchanged:
        ids_BT = jax.lax.all_gather(ids_BT, name, axis=dimension, tiled=True)
    if vocab:
        ids_BT = ids_BT - jax.lax.axis_index(vocab) * table_VD.shape[0]
        here_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
        x_BTD = jnp.where(here_BT[..., None], table_VD[jnp.where(here_BT, ids_BT, 0)], 0).astype(dtype)
        x_BTD = jax.lax.psum(x_BTD, vocab)
    else:
        x_BTD = table_VD[ids_BT].astype(dtype)
    for name, dimension in reversed(exchanged):  # what was gathered last stands outermost
        x_BTD = jax.lax.all_to_all(x_BTD, name, split_axis=dimension, concat_axis=2, tiled=True)
    return x_BTD


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()

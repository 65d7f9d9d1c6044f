"""Rows to their experts and back: on one device by sorting, between devices over the mesh's ``expert`` axis.

Every device holds a part of the experts and, of a batch that splits evenly, a part of the rows. On a CPU each part of
the experts sees all rows of its axis and leaves out those of others; elsewhere a row travels to its experts alone. A
batch that does not split, as in decoding, is whole on every device and does not travel. Nothing is dropped: buffers
are sized for all rows going to one device.

Left out on purpose: overlapping the exchange with the matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

AXIS = "expert"

# (rows sorted by expert, rows of each expert, expert of each row, past the last for rows of none) -> what comes out
Feed = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Order(NamedTuple):
    """Choices sorted by expert: ``order_R`` says which one stands at a place, ``place_Mk`` where each choice stands.

    ``experts_R`` is the expert at each place and ``sizes_E`` how many there are of each.
    """

    order_R: jax.Array
    place_Mk: jax.Array
    experts_R: jax.Array
    sizes_E: jax.Array


def sort(chosen_Mk: jax.Array, experts: int) -> Order:
    """Sort choices by expert; those of ``experts`` or more are nobody's and come last.

    There are no more places than can be somebody's, where a token's choices differ: ``M * min(k, experts)``.
    """
    M, k = chosen_Mk.shape
    chosen_R = jnp.minimum(chosen_Mk.reshape(-1), experts)
    order_R = jnp.argsort(chosen_R, stable=True)
    place_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(M * k), unique_indices=True)
    sizes_E = jnp.sum(chosen_R[:, None] == jnp.arange(experts), axis=0)
    order_R = order_R[: M * min(k, experts)]
    return Order(order_R, place_R.reshape(M, k), chosen_R[order_R], sizes_E)


@jax.custom_vjp
def spread(x_MD: jax.Array, order: Order) -> jax.Array:
    """Return ``[R, D]``: for each place, the row whose choice stands there."""
    return x_MD[order.order_R // order.place_Mk.shape[1]]


@jax.custom_vjp
def collect(y_RD: jax.Array, order: Order) -> jax.Array:
    """Return ``[M, k, D]``: for each choice, what stands in its place; zero where it has none."""
    return y_RD.at[order.place_Mk].get(mode="fill", fill_value=0)


# Each is the other's transpose, so that gradients too are gathers and not scatters.
spread.defvjp(
    lambda x_MD, order: (spread(x_MD, order), order),
    lambda order, dy_RD: (jnp.sum(collect(dy_RD, order), axis=1), None),
)
collect.defvjp(
    lambda y_RD, order: (collect(y_RD, order), order),
    lambda order, dy_MkD: (dy_MkD.reshape(-1, dy_MkD.shape[-1])[order.order_R], None),
)


def locally(feed: Feed, experts: int, x_MD: jax.Array, chosen_Mk: jax.Array, weights_Mk: jax.Array) -> jax.Array:
    """Return ``[M, D]`` fp32: what the ``experts`` of this device make of the rows that are sent to them."""
    order = sort(chosen_Mk, experts)
    y_RD = feed(spread(x_MD, order), order.sizes_E, order.experts_R)
    # A place of nobody's may hold anything finite; its choice weighs nothing.
    mine_Mk = chosen_Mk < experts
    return jnp.sum(collect(y_RD, order) * jnp.where(mine_Mk, weights_Mk, 0)[..., None], axis=1)


def here(feed: Feed, experts: int, x_MD: jax.Array, chosen_Mk: jax.Array, weights_Mk: jax.Array) -> jax.Array:
    """Return this device's share of the output, of rows that are whole on every device of the axis."""
    return locally(feed, experts, x_MD, _own(chosen_Mk, experts), weights_Mk)


def gathered(feed: Feed, experts: int, x_MD: jax.Array, chosen_Mk: jax.Array, weights_Mk: jax.Array) -> jax.Array:
    """Return the output of this device's rows: all rows are gathered, and the shares of all devices summed."""
    rows = (jax.lax.all_gather(array, AXIS, tiled=True) for array in (x_MD, chosen_Mk, weights_Mk))
    return jax.lax.psum_scatter(here(feed, experts, *rows), AXIS, tiled=True)


def exchanged(feed: Feed, experts: int, x_MD: jax.Array, chosen_Mk: jax.Array, weights_Mk: jax.Array) -> jax.Array:
    """Return the output of this device's rows: each is sent to the devices of its experts, and what they make of it
    comes back.
    """
    devices, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    order = sort(chosen_Mk, devices * experts)
    counts_PE = jax.lax.all_gather(order.sizes_E, AXIS)  # of all devices, for all experts
    sent_PP = counts_PE.reshape(devices, devices, experts).sum(axis=-1)  # from, to
    before_PP = jnp.cumsum(sent_PP, axis=1) - sent_PP  # where a sender's rows for each receiver begin
    ahead_PP = jnp.cumsum(sent_PP, axis=0) - sent_PP  # where they begin at the receiver

    x_RD = spread(x_MD, order)
    buffer_QD = jnp.zeros((devices * x_MD.shape[0] * min(chosen_Mk.shape[1], experts), x_MD.shape[1]), x_MD.dtype)
    received_QD = jax.lax.ragged_all_to_all(
        x_RD, buffer_QD, before_PP[me], sent_PP[me], ahead_PP[me], sent_PP[:, me], axis_name=AXIS
    )
    mine_PE = jax.lax.dynamic_slice_in_dim(counts_PE, me * experts, experts, axis=1)
    run_Q = jnp.searchsorted(jnp.cumsum(mine_PE.reshape(-1)), jnp.arange(len(received_QD)), side="right")
    arrived = sort(jnp.where(run_Q < mine_PE.size, run_Q % experts, experts)[:, None], experts)
    y_QD = feed(spread(received_QD, arrived), arrived.sizes_E, arrived.experts_R)
    y_RD = jax.lax.ragged_all_to_all(
        collect(y_QD, arrived)[:, 0],
        jnp.zeros((len(x_RD), y_QD.shape[1]), y_QD.dtype),
        ahead_PP[:, me],
        sent_PP[:, me],
        before_PP[:, me],
        sent_PP[me],
        axis_name=AXIS,
    )
    mine_Mk = chosen_Mk < devices * experts
    return jnp.sum(collect(y_RD, order) * jnp.where(mine_Mk, weights_Mk, 0)[..., None], axis=1)


def _own(chosen_Mk: jax.Array, experts: int) -> jax.Array:
    """Number this device's experts from 0; others', and nobody, become ``experts``."""
    own_Mk = chosen_Mk - jax.lax.axis_index(AXIS) * experts
    return jnp.where((own_Mk >= 0) & (own_Mk < experts), own_Mk, experts)

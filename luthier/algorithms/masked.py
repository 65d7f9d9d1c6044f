"""Masked reductions, in one place."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_sum(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return the fp32 sum of ``x`` where ``mask`` is set; values outside it, NaN included, do not count."""
    mask = mask_BT.astype(bool)
    return jnp.sum(jnp.where(mask, x_BT.astype(jnp.float32), 0.0))


def count(mask_BT: jax.Array) -> jax.Array:
    """Return the number of set entries, as fp32."""
    return jnp.sum(mask_BT.astype(jnp.float32))


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Return ``total / weight``, and 0 where nothing was weighed."""
    return jnp.where(weight > 0, total / jnp.maximum(weight, 1.0), 0.0)


def sequence_sum(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return the fp32 sum over each sequence's tokens where ``mask`` is set; what is outside it does not count."""
    return jnp.sum(jnp.where(mask_BT.astype(bool), x_BT.astype(jnp.float32), 0.0), axis=-1)


def sequence_count(mask_BT: jax.Array) -> jax.Array:
    """Return each sequence's number of set entries, as fp32."""
    return jnp.sum(mask_BT.astype(jnp.float32), axis=-1)


def sequence_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return the mean over each sequence's tokens where ``mask`` is set; 0 where it is set nowhere."""
    return ratio(sequence_sum(x_BT, mask_BT), sequence_count(mask_BT))


def nonempty(mask_BT: jax.Array) -> jax.Array:
    """Return which sequences have any entry set."""
    return jnp.any(mask_BT.astype(bool), axis=-1)

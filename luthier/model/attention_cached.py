"""Attention of new tokens to the cache and to each other.

The cache is read in blocks, as many as the longest sequence of the batch has filled, with the softmax carried from
block to block (Milakov and Gimelshein, arXiv 1805.02867). So what is read follows what is in use, and one program
serves all lengths. Left out on purpose: gradients, which sampling has no use for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from luthier.model import layers
from luthier.model.attention_blockwise import FORBIDDEN, matmul, outputs
from luthier.model.cache import LayerPast
from luthier.model.softmax import Softmax


def cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sinks_N: jax.Array | None,
    past: LayerPast,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """Return ``[B, T, N, H]``: each new token attends to its sequence's past, and to the new tokens up to itself.

    Padding stands at the end of a row. Other arguments as in ``attention``.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    group = N // K
    q_BKRH = q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * group, H)
    alone = _over_itself if T == 1 else _over_new
    new = alone(q_BTNH, k_BTKH, v_BTKH, sinks_N, scale=scale, window=window, softcap=softcap)
    queries_BT = past.lengths_B[:, None] + jnp.arange(T)

    def block(number: jax.Array, so_far: Softmax) -> Softmax:
        keys, values = past.read(number, v_BTKH.shape[-1])
        positions_BS = past.positions(number)
        held_BS = positions_BS >= 0
        # What an ended sequence left may be NaN where its numbers overflowed, which a weight of 0 would let through.
        values = jnp.where(held_BS[:, None, :, None], values, 0)
        allowed_BTS = jnp.broadcast_to(held_BS[:, None], (B, T, held_BS.shape[1]))
        if window is not None:
            allowed_BTS &= queries_BT[:, :, None] - positions_BS[:, None] < window
        allowed = jnp.repeat(allowed_BTS, group, axis=1)[:, None]
        scores = layers.softcap(matmul(q_BKRH.astype(keys.dtype), keys, transpose=True) * scale, softcap)
        return so_far.met(jnp.where(allowed, scores, FORBIDDEN), values, values.dtype)

    o_BKRH, _ = jax.lax.fori_loop(0, past.blocks, block, new).mean()
    return o_BKRH.astype(q_BTNH.dtype).reshape(B, K, T, group, -1).transpose(0, 2, 1, 3, 4).reshape(B, T, N, -1)


def _over_itself(
    q_B1NH: Any, k_B1KH: Any, v_B1KH: Any, sinks_N: Any, *, scale: float, window: int | None, softcap: float | None
) -> Softmax:
    """Return the softmax of one new token over itself, and the sinks."""
    B, _, _, H = q_B1NH.shape
    q_BKRH = q_B1NH.reshape(B, k_B1KH.shape[2], -1, H)
    k_BK1H, v_BK1H = k_B1KH.swapaxes(1, 2), v_B1KH.swapaxes(1, 2)
    score_BKR = layers.softcap(
        jnp.sum(q_BKRH.astype(jnp.float32) * k_BK1H.astype(jnp.float32), axis=-1) * scale, softcap
    )
    values = jnp.broadcast_to(v_BK1H.astype(jnp.float32), (*q_BKRH.shape[:3], v_BK1H.shape[-1]))
    if sinks_N is None:
        return Softmax(score_BKR, jnp.ones_like(score_BKR), values)
    sink_KR = sinks_N.astype(jnp.float32).reshape(score_BKR.shape[1:])
    top_BKR = jnp.maximum(score_BKR, sink_KR)
    p_BKR = jnp.exp(score_BKR - top_BKR)
    return Softmax(top_BKR, p_BKR + jnp.exp(sink_KR - top_BKR), values * p_BKR[..., None])


def _over_new(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, sinks_N: Any, **settings: Any) -> Softmax:
    """Return the softmax of several new tokens over each other, and the sinks."""
    o_BKRH, lse_BKR = outputs(q_BTNH, k_BTKH, v_BTKH, sinks_N, **settings)
    return Softmax(lse_BKR, jnp.ones_like(lse_BKR), o_BKRH.astype(jnp.float32))

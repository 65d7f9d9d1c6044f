"""Attention by JAX's Pallas splash kernel on a TPU.

Left out on purpose: our own kernel. Splash skips the blocks that causality and windows forbid and masks segments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from luthier.model import zigzag
from luthier.model.segments import Prefixed, Segments

LANES = 128  # a TPU's vector width; blocks and head sizes are multiples of it
MAX_BLOCK = 512


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    ways: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """Return causal attention within segments, ``[B, T, N, H]``; ``interpret`` runs the kernel without a TPU.

    Arguments as in ``attention``. With ``ways`` over 1, queries are those that ``zigzag`` puts on this device. Raises
    ValueError for prefixed segments, which the kernel has no mask for.
    """
    if isinstance(segments, Prefixed):
        raise ValueError("splash: the kernel masks whole segments only; pack prompts without sharing them")
    T, N, S = *q_BTNH.shape[1:3], k_BSKH.shape[1]
    kernel = (
        _kernel(N, T, S, window, softcap, interpret)
        if ways == 1
        else _own_kernel(ways, N, T, window, softcap, interpret)
    )
    queries, *keys = _padded(q_BTNH * scale), _padded(k_BSKH), _padded(v_BSKH)
    ids = None
    if segments is not None:
        of_queries = segments if ways == 1 else segments[:, zigzag.own_places(S)]
        ids = kernels.SegmentIds(q=_padded_ids(of_queries), kv=_padded_ids(segments))
    o_BNTH: Any = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(queries, *keys, ids, sinks_N)
    return o_BNTH.swapaxes(1, 2)[:, :T, :, : v_BSKH.shape[-1]]


def _padded(x_BTNH: jax.Array) -> jax.Array:
    """Return ``[B, N, T, H]``, with zeros after the end of T and H; no real token sees what is added."""
    _, T, _, H = x_BTNH.shape
    return jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, -T % LANES), (0, -H % LANES)))


def _padded_ids(segments_BT: jax.Array) -> jax.Array:
    return jnp.pad(segments_BT, ((0, 0), (0, -segments_BT.shape[1] % LANES)))


def _own_kernel(
    ways: int, heads: int, length: int, window: int | None, softcap: float | None, interpret: bool
) -> kernels.SplashAttentionKernel:
    """Return the kernel for this device's ``length`` queries of rows that lie on ``ways`` devices."""
    order = zigzag.order(length * ways, ways).reshape(ways, length)
    queries = np.pad(order, ((0, 0), (0, -length % LANES)), mode="edge").reshape(-1)
    kernel = _kernel(heads, len(queries), length * ways, window, softcap, interpret, queries, ways)

    def own(x: jax.Array) -> jax.Array:
        axis = 0 if x.ndim == 1 else 1  # of places in the row, and of heads by blocks
        size = x.shape[axis] // ways
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(zigzag.AXIS) * size, size, axis)

    return jax.tree.map(own, kernel)


def _kernel(
    heads: int,
    queries: int,
    keys: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
    places_T: np.ndarray | None = None,
    shards: int = 1,
) -> kernels.SplashAttentionKernel:
    """Return the kernel for so many queries and keys, rounded up; ``places_T`` are the queries' in the row."""
    shape = (-(-queries // LANES) * LANES, -(-keys // LANES) * LANES)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    if places_T is not None:
        mask.q_sequence = places_T
    block_q, block_kv = _block(shape[0] // shards), _block(shape[1])
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _block(length: int) -> int:
    return next(size for size in (MAX_BLOCK, 256, LANES) if length % size == 0)

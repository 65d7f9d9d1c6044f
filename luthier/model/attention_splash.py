"""Attention by JAX's Pallas splash kernel on a TPU.

Left out on purpose: our own kernel. Splash skips the blocks that causality and windows forbid and masks segments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

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
    interpret: bool = False,
) -> jax.Array:
    """Return causal attention within segments, ``[B, T, N, H]``; ``interpret`` runs the kernel without a TPU.

    Arguments as in ``attention``. Raises ValueError for prefixed segments, which the kernel has no mask for.
    """
    if isinstance(segments, Prefixed):
        raise ValueError("splash: the kernel masks whole segments only; pack prompts without sharing them")
    _, T, N, _ = q_BTNH.shape
    length = -(-T // LANES) * LANES
    heads = tuple(_padded(x, length) for x in (q_BTNH * scale, k_BSKH, v_BSKH))
    ids = None
    if segments is not None:
        ids_BT = jnp.pad(segments, ((0, 0), (0, length - T)))
        ids = kernels.SegmentIds(q=ids_BT, kv=ids_BT)
    kernel = _kernel(N, length, window, softcap, interpret)
    o_BNTH: Any = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(*heads, ids, sinks_N)
    return o_BNTH.swapaxes(1, 2)[:, :T, :, : v_BSKH.shape[-1]]


def _padded(x_BTNH: jax.Array, length: int) -> jax.Array:
    """Return ``[B, N, T, H]``, with zeros after the end of T and H; no real token sees what is added."""
    _, T, _, H = x_BTNH.shape
    return jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - T), (0, -H % LANES)))


def _kernel(
    heads: int, length: int, window: int | None, softcap: float | None, interpret: bool
) -> kernels.SplashAttentionKernel:
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (MAX_BLOCK, 256, LANES) if length % size == 0)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

"""Causal attention within segments: one function, the platform's best kernel.

``blockwise`` is plain XLA and runs anywhere; ``cudnn`` and ``splash`` are the fused kernels of NVIDIA GPUs and TPUs.
Where a cache goes before the tokens, ``attention_cached`` takes over. Left out on purpose: attention that is not
causal, and biases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.errors import UserError
from luthier.model.attention_blockwise import blockwise
from luthier.model.attention_cached import cached
from luthier.model.cache import LayerPast
from luthier.model.segments import Prefixed, Segments, related

Kernel = Callable[..., jax.Array]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    *,
    implementation: str = "auto",
    scale: float | None = None,
    window: int | None = None,
    past: LayerPast | None = None,
) -> jax.Array:
    """Return ``[B, T, N, H]``: each token attends to the tokens of its segment up to itself, by their order in the row.

    Where segments are ``Prefixed``, a token also attends to all of the segment that its own goes on from: a prompt
    stands in a row once, and serves all its completions (arXiv 2506.05433).

    Queries may have more heads than keys and values (N a multiple of K; Ainslie et al., arXiv 2305.13245). Padding is
    segment 0 and attends to padding. ``segments`` None says that rows hold one segment each, padded on the right
    if at all, which saves the masks. ``window`` limits attention to that many tokens, the token itself included;
    ``scale`` multiplies scores (default ``H ** -0.5``). With a ``past``, rows go on from what is cached of them, and
    have no segments.

    Raises UserError where ``implementation`` ("auto", "blockwise", "cudnn" or "splash") cannot run here, ValueError for
    prefixed segments where ``shares_prompts`` says no, or with a ``window``, since they are not next to their prefix.
    """
    if isinstance(segments, Prefixed) and window is not None:
        raise ValueError("attention: a window counts tokens by their order in the row, which prefixes are out of")
    scale = float(q_BTNH.shape[-1] ** -0.5) if scale is None else scale
    if past is not None:
        with jax.named_scope("attention_cached"):
            return cached(q_BTNH, k_BSKH, v_BSKH, past, scale=scale, window=window)
    kernel = functools.partial(choose(implementation, q_BTNH.dtype, q_BTNH.shape[-1]), scale=scale, window=window)
    with jax.named_scope("attention_kernel"):
        return _over_mesh(kernel, q_BTNH, k_BSKH, v_BSKH, segments)


def choose(implementation: str, dtype: Any, head_dim: int) -> Kernel:
    """Return the kernel that ``implementation`` means on the platform in use, for heads of ``head_dim``.

    Raises UserError where it cannot run.
    """
    platform, implementation = mesh_lib.platform(), _named(implementation, dtype, head_dim)
    if implementation == "cudnn" and (platform != "gpu" or not _cudnn_fits(dtype, head_dim)):
        raise UserError(
            f"attention=cudnn: needs an NVIDIA GPU, bfloat16 and a head size of at most 128, a multiple of 8; "
            f"here are a {platform}, {jnp.dtype(dtype).name} and {head_dim}. Use attention=auto."
        )
    if implementation == "splash":
        if platform != "tpu":
            raise UserError(f"attention=splash: needs a TPU, this is a {platform}. Use attention=auto.")
        from luthier.model.attention_splash import splash  # Pallas takes half a second to import

        return splash
    return {"blockwise": blockwise, "cudnn": cudnn}[implementation]


def shares_prompts(implementation: str, dtype: Any, head_dim: int) -> bool:
    """Say whether the kernel that ``implementation`` means here takes ``Prefixed`` segments."""
    return _named(implementation, dtype, head_dim) != "splash"


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """Return attention by cuDNN's fused kernel; packed rows take a mask ``[B, 1, T, T]``, scores are never whole."""
    length = q_BTNH.shape[1]
    if length % 2 and segments is not None:  # cuDNN takes masks of even size alone
        pad = ((0, 0), (0, 1))
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
        segments = jax.tree.map(lambda ids_BT: jnp.pad(ids_BT, pad), segments)
    mask = None if segments is None else related(segments, segments)[:, None]
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return o_BTNH[:, :length]


def _named(implementation: str, dtype: Any, head_dim: int) -> str:
    """Return the kernel's name, where "auto" asks for the platform's best."""
    if implementation != "auto":
        return implementation
    best = {"gpu": "cudnn" if _cudnn_fits(dtype, head_dim) else "blockwise", "tpu": "splash"}
    return best.get(mesh_lib.platform(), "blockwise")


def _cudnn_fits(dtype: Any, head_dim: int) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


def _over_mesh(
    kernel: Kernel, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments: Segments
) -> jax.Array:
    """Run ``kernel`` on each device's rows and heads; both are independent, so no device needs another's."""
    mesh = mesh_lib.current()
    if mesh is None or mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, segments)
    batch = mesh_lib.BATCH_AXES if q_BTNH.shape[0] % mesh_lib.batch_shards(mesh) == 0 else None
    heads = None
    if q_BTNH.shape[2] % mesh.shape["tensor"] == 0:
        # Fewer KV heads than devices: each is repeated until every device has the one its queries share.
        kv_heads = math.lcm(k_BSKH.shape[2], mesh.shape["tensor"])
        if q_BTNH.shape[2] % kv_heads == 0:
            heads = "tensor"
            k_BSKH, v_BSKH = (jnp.repeat(x, kv_heads // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    spec = P(batch, None, heads, None)
    # Each row and head is computed whole on one device: there is no replication for check_vma to verify.
    return jax.shard_map(kernel, mesh=mesh, in_specs=(spec, spec, spec, P(batch)), out_specs=spec, check_vma=False)(
        q_BTNH, k_BSKH, v_BSKH, segments
    )

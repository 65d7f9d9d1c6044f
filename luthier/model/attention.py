"""Causal attention within segments: one function, the platform's best kernel.

``blockwise`` is plain XLA and runs anywhere; ``cudnn`` and ``splash`` are the fused kernels of NVIDIA GPUs and TPUs.
Where a cache goes before the tokens, ``attention_cached`` takes over, and where a row's tokens lie on several devices,
``attention_context``. Left out on purpose: attention that is not causal, and biases other than sinks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.errors import UserError
from luthier.model import zigzag
from luthier.model.attention_blockwise import blockwise
from luthier.model.attention_cached import cached
from luthier.model.attention_context import across, gathering
from luthier.model.cache import LayerPast
from luthier.model.segments import Prefixed, Segments, related, seen

Kernel = Callable[..., jax.Array]


@dataclass(frozen=True)
class Needs:
    """What attention is asked for, as far as kernels differ in it.

    ``head_dim`` is the size of queries and keys, ``value_dim`` that of values where it is another; ``softcap`` and
    ``sinks`` say whether there are any.
    """

    head_dim: int
    value_dim: int | None = None
    softcap: bool = False
    sinks: bool = False


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    *,
    implementation: str = "auto",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    past: LayerPast | None = None,
    context: str | None = None,
    gradient_dtype: Any = None,
) -> jax.Array:
    """Return ``[B, T, N, H]``: each token attends to the tokens of its segment up to itself, by their order in the row.

    H is the size of a value, which may be another than that of queries and keys (arXiv 2405.04434).

    Where segments are ``Prefixed``, a token also attends to all of the segment that its own goes on from: a prompt
    stands in a row once, and serves all its completions (arXiv 2506.05433).

    Queries may have more heads than keys and values (N a multiple of K; Ainslie et al., arXiv 2305.13245). Padding is
    segment 0 and attends to padding. ``segments`` None says that rows hold one segment each, padded on the right
    if at all, which saves the masks. ``window`` limits attention to that many tokens, the token itself included;
    ``scale`` multiplies scores (default ``H ** -0.5`` of queries), which ``softcap`` then bounds: s becomes ``softcap *
    tanh(s / softcap)`` (Gemma 2, arXiv 2408.00118). ``sinks_N`` is a score for each query head that takes its share of
    the softmax and has no value (gpt-oss, arXiv 2508.10925). With a ``past``, rows go on from what is cached of them,
    and have no segments. ``context`` says that rows lie over the mesh's ``context`` axis in the order of ``zigzag``,
    and how keys and values get to the queries: "all_gather" or "ring". ``gradient_dtype`` is ``blockwise``'s; other
    kernels go backward in the type of the queries.

    Raises UserError where ``implementation`` ("auto", "blockwise", "cudnn" or "splash") cannot run here, ValueError for
    prefixed segments where ``shares_prompts`` says no, or without positions where there is a ``window``.
    """
    scale = float(q_BTNH.shape[-1] ** -0.5) if scale is None else scale
    if past is not None:
        with jax.named_scope("attention_cached"):
            return cached(q_BTNH, k_BSKH, v_BSKH, sinks_N, past, scale=scale, window=window, softcap=softcap)
    if isinstance(segments, Prefixed) and window is None:
        segments = segments._replace(positions_BT=None)  # they are no concern of the program
    needs = Needs(q_BTNH.shape[-1], v_BSKH.shape[-1], softcap is not None, sinks_N is not None)
    kernel = choose(implementation, q_BTNH.dtype, needs)
    if context == "ring" or (context is not None and kernel is blockwise):
        kernel = functools.partial(across, ring=context == "ring")
    elif context is not None:
        kernel = functools.partial(gathering, kernel)
    elif kernel is blockwise:
        kernel = functools.partial(blockwise, gradient_dtype=gradient_dtype)
    kernel = functools.partial(kernel, scale=scale, window=window, softcap=softcap)
    with jax.named_scope("attention_kernel"):
        return _over_mesh(kernel, q_BTNH, k_BSKH, v_BSKH, segments, sinks_N, None if context is None else zigzag.AXIS)


def choose(implementation: str, dtype: Any, needs: Needs) -> Kernel:
    """Return the kernel that ``implementation`` means on the platform in use, for what is asked of it.

    Raises UserError where it cannot run.
    """
    platform, implementation = mesh_lib.platform(), _named(implementation, dtype, needs)
    if implementation == "cudnn" and (platform != "gpu" or not _cudnn_fits(dtype, needs)):
        raise UserError(
            "attention=cudnn: needs an NVIDIA GPU, bfloat16 (and not float32_activations=attention), a head size of at "
            "most 128 that is a multiple of 8 and the values' too, and a model without soft caps and sinks; here are a "
            f"{platform}, {jnp.dtype(dtype).name} and {_described(needs)}. Use attention=auto."
        )
    if implementation == "splash":
        if platform != "tpu":
            raise UserError(f"attention=splash: needs a TPU, this is a {platform}. Use attention=auto.")
        from luthier.model.attention_splash import splash  # Pallas takes half a second to import

        return splash
    return {"blockwise": blockwise, "cudnn": cudnn}[implementation]


def shares_prompts(implementation: str, dtype: Any, needs: Needs) -> bool:
    """Say whether the kernel that ``implementation`` means here takes ``Prefixed`` segments."""
    return _named(implementation, dtype, needs) != "splash"


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    sinks_N: None = None,
    *,
    scale: float,
    window: int | None,
    softcap: None = None,
    ways: int = 1,
) -> jax.Array:
    """Return attention by cuDNN's fused kernel; packed rows take a mask ``[B, 1, T, T]``, scores are never whole.

    It knows neither sinks nor soft caps. With ``ways`` over 1, queries are those that ``zigzag`` puts on this device.
    """
    if ways > 1:
        mask = _spread_mask(k_BSKH.shape[1], segments, window)
        o_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, implementation="cudnn")
        return checkpoint_name(o_BTNH, "attention")
    length = q_BTNH.shape[1]
    if length % 2 and segments is not None:  # cuDNN takes masks of even size alone
        pad = ((0, 0), (0, 1))
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
        segments = jax.tree.map(lambda ids_BT: jnp.pad(ids_BT, pad), segments)
    mask = None if segments is None else related(segments, segments, window)[:, None]
    # Of prefixed segments, the mask knows of the window.
    nearest = None if window is None or isinstance(segments, Prefixed) else (window - 1, 0)
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=nearest,
        implementation="cudnn",
    )
    return o_BTNH[:, :length]


def _spread_mask(length: int, segments: Segments, window: int | None) -> jax.Array:
    """Return ``[B or 1, 1, t, T]``: what the tokens of rows of ``length`` that lie on this device see."""
    places_t = zigzag.own_places(length)
    of_queries = jax.tree.map(lambda ids_BT: ids_BT[:, places_t], segments)
    return seen(places_t, jnp.arange(length), of_queries, segments, window)[:, None]


def _named(implementation: str, dtype: Any, needs: Needs) -> str:
    """Return the kernel's name, where "auto" asks for the platform's best."""
    if implementation != "auto":
        return implementation
    best = {"gpu": "cudnn" if _cudnn_fits(dtype, needs) else "blockwise", "tpu": "splash"}
    return best.get(mesh_lib.platform(), "blockwise")


def _cudnn_fits(dtype: Any, needs: Needs) -> bool:
    plain = needs.value_dim in (None, needs.head_dim) and not needs.softcap and not needs.sinks
    return plain and dtype in (jnp.bfloat16, jnp.float16) and needs.head_dim % 8 == 0 and needs.head_dim <= 128


def _described(needs: Needs) -> str:
    extras = {"a soft cap": needs.softcap, "sinks": needs.sinks}
    sizes = f"heads of {needs.head_dim}, values of {needs.value_dim or needs.head_dim}"
    return ", ".join([sizes, *(name for name, wanted in extras.items() if wanted)])


def _over_mesh(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    sinks_N: Any,
    time: str | None,
) -> jax.Array:
    """Run ``kernel`` on each device's rows and heads; both are independent, so no device needs another's.

    The tokens of a row are split over the mesh axis ``time``, where it is given: those the kernel sees to.
    """
    mesh = mesh_lib.current()
    if mesh is None or mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, segments, sinks_N)
    batch = mesh_lib.BATCH_AXES if q_BTNH.shape[0] % mesh_lib.batch_shards(mesh) == 0 else None
    heads = None
    if q_BTNH.shape[2] % mesh.shape["tensor"] == 0:
        # Fewer KV heads than devices: each is repeated until every device has the one its queries share.
        kv_heads = math.lcm(k_BSKH.shape[2], mesh.shape["tensor"])
        if q_BTNH.shape[2] % kv_heads == 0:
            heads = "tensor"
            k_BSKH, v_BSKH = (jnp.repeat(x, kv_heads // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    spec = P(batch, time, heads, None)
    specs = (spec, spec, spec, P(batch, time), P(heads))
    # Each row and head is computed whole on one device: there is no replication for check_vma to verify.
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(
        q_BTNH, k_BSKH, v_BSKH, segments, sinks_N
    )

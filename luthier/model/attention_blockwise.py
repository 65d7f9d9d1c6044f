"""Blockwise attention in plain XLA: any platform, any head size, memory linear in the length of a row.

The queries of a group share their KV head, so they are laid out as further rows of one matmul: ``q_BKRH``, where R is
tokens times G, G heads to a token. The backward pass holds scores transposed (keys by queries), which makes each of its
matmuls one that XLA's CPU compiler has a fast kernel for (see ``cpu``). Probabilities are computed again from the saved
log-sum-exp, as in FlashAttention-2 (Dao, arXiv 2307.08691).

Tokens are cut into blocks, and the blocks into a few spans. A span works on the keys up to its own end (or, going
backward, on the queries from its own start), so that most of what causality forbids is not computed. Spans are
unrolled and the blocks of a span looped over, so that a program's size does not grow with the length. Where a window is
small against the row there is one span, and each block cuts out the few tokens it has to do with: time is then linear
in the length of a row, too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from luthier.model import layers
from luthier.model.cpu import fence, transposed
from luthier.model.segments import Prefixed, Segments, related

MAX_BLOCK = 128  # tokens
MAX_SPANS = 8
SCORES_LIMIT = 128 * 2**20  # bytes of fp32 scores in one block
FORBIDDEN = -1e30  # as good as -inf, but no NaN where a whole row is forbidden


def blockwise(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: Segments,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    gradient_dtype: Any = None,
) -> jax.Array:
    """Return causal attention within segments, ``[B, T, N, H]``; arguments as in ``attention``.

    The backward pass finds queries, keys and values saved in ``gradient_dtype`` (default: the queries' own), and its
    products are computed in that.
    """
    B, T, N, _ = q_BTNH.shape
    K, H = v_BSKH.shape[2:]
    scoring = _Scoring(scale, window, softcap, jnp.dtype(gradient_dtype or q_BTNH.dtype))
    plan, *arrays = _laid_out(q_BTNH, k_BSKH, v_BSKH, segments, sinks_N, scoring)
    o_BKRH = _differentiable_attend(plan, *arrays)
    o_BTNH = o_BKRH.reshape(B, K, -1, plan.group, H).transpose(0, 2, 1, 3, 4).reshape(B, -1, N, H)
    return o_BTNH[:, :T]


def outputs(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Return causal attention as ``[B, K, R, H]`` and the log-sum-exp of its scores ``[B, K, R]``, R being T times G.

    No gradient, one segment a row: for attention of which this is but a part. Sinks count as scores.
    """
    plan, *arrays = _laid_out(q_BTNH, k_BSKH, v_BSKH, None, sinks_N, _Scoring(scale, window, softcap))
    rows = q_BTNH.shape[1] * plan.group
    o_BKRH, lse_BKR = _outputs(plan, *arrays)
    return o_BKRH[:, :, :rows], lse_BKR[:, :, :rows]


def _laid_out(
    q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, segments: Any, sinks_N: Any, scoring: _Scoring
) -> tuple[_Plan, jax.Array, jax.Array, jax.Array, Any, Any]:
    """Return (plan, ``q_BKRH``, ``k_BKSH``, ``v_BKSH``, segments, ``sinks_KG``), padded to whole blocks."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    by_order = scoring.window is not None and not isinstance(segments, Prefixed)
    reach = min(T, scoring.window) if by_order else T
    block = block_size(B * N, T, reach, MAX_BLOCK)
    length = -(-T // block) * block
    plan = _Plan(length, block, N // K, length if reach == T else reach, scoring)
    pad = plan.length - T
    if pad:  # at the end, where no real token sees it
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
        segments = jax.tree.map(lambda ids_BT: jnp.pad(ids_BT, ((0, 0), (0, pad))), segments)
    q_BKRH = q_BTNH.reshape(B, -1, K, plan.group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    sinks_KG = None if sinks_N is None else sinks_N.reshape(K, plan.group)
    return plan, q_BKRH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), segments, sinks_KG


@dataclass(frozen=True)
class _Scoring:
    """How scores are made of products, as in ``attention``, and the type of the gradients' products."""

    scale: float
    window: int | None
    softcap: float | None
    gradient_dtype: Any = None


@dataclass(frozen=True)
class _Plan:
    """How rows of ``length`` tokens are cut, ``group`` query heads to a KV head.

    A token sees none that stands ``reach`` or more before it in its row, which is its ``length`` where any may be seen.
    """

    length: int
    block: int
    group: int
    reach: int
    scoring: _Scoring

    @functools.cached_property
    def slides(self) -> bool:
        """Whether each block cuts out the tokens it has to do with, which is less work than a span's."""
        spanned = sum((end - first) * (end - self.first_key(first)) for first, end in self._spans(MAX_SPANS))
        return self.length * self.width < spanned

    @property
    def width(self) -> int:
        """The tokens, in whole blocks, that those of a block may see, or may be seen by."""
        return min(self.length, -(-(self.reach - 1) // self.block) * self.block + self.block)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The (first token, end) of each span of whole blocks."""
        return self._spans(1 if self.slides else MAX_SPANS)

    def _spans(self, most: int) -> list[tuple[int, int]]:
        blocks = self.length // self.block
        count = min(blocks, most)
        edges = [blocks * i // count * self.block for i in range(count + 1)]
        return list(itertools.pairwise(edges))

    def first_key(self, first_query: int) -> int:
        """Return the first token, on a block's edge, that queries from ``first_query`` on may see."""
        return max(0, first_query - self.reach + 1) // self.block * self.block

    def end_query(self, end_key: int) -> int:
        """Return the end, on a block's edge, of the queries that may see a key before ``end_key``."""
        return min(self.length, -(-(end_key + self.reach - 1) // self.block) * self.block)

    def allowed(self, segments: Any, query: Any, queries: int, key: Any, keys: int) -> jax.Array:
        """Return which keys each of ``queries`` tokens from ``query`` on sees: ``[B or 1, 1, queries * G, keys]``."""
        distance = (query + jnp.arange(queries * self.group) // self.group)[:, None] - (key + jnp.arange(keys))
        allowed = distance >= 0
        if self.reach < self.length:
            allowed &= distance < self.reach
        if segments is None:
            return allowed[None, None]
        of_queries = jax.tree.map(
            lambda ids_BT: jnp.repeat(_cut(ids_BT, query, queries, 1), self.group, axis=1), segments
        )
        of_keys = jax.tree.map(lambda ids_BT: _cut(ids_BT, key, keys, 1), segments)
        return (allowed & related(of_queries, of_keys, self.scoring.window))[:, None]


def block_size(heads: int, length: int, reach: int, most: int) -> int:
    """Return tokens in a block: as many up to ``most`` as memory allows, evened out so that little is padded.

    Its tokens' scores with each other, and with the ``reach`` tokens before them, are held at once.
    """
    while most > 16 and heads * most * min(length, reach + most) * 4 > SCORES_LIMIT:
        most //= 2
    blocks = -(-length // most)
    return length if blocks == 1 else -(-length // (blocks * 16)) * 16


def _attend(plan: _Plan, q_BKRH: Any, k_BKSH: Any, v_BKSH: Any, segments: Any, sinks_KG: Any) -> jax.Array:
    return _outputs(plan, q_BKRH, k_BKSH, v_BKSH, segments, sinks_KG)[0]


def _attend_forward(plan: _Plan, q_BKRH: Any, k_BKSH: Any, v_BKSH: Any, segments: Any, sinks_KG: Any) -> Any:
    o_BKRH, lse_BKR = _outputs(plan, q_BKRH, k_BKSH, v_BKSH, segments, sinks_KG)
    q_BKRH, k_BKSH, v_BKSH = (x.astype(plan.scoring.gradient_dtype) for x in (q_BKRH, k_BKSH, v_BKSH))
    # Named here, so that the "dots" policy of `layers.remat` keeps just what the gradient needs, in this layout.
    arrays = (q_BKRH, k_BKSH, v_BKSH, o_BKRH, lse_BKR)
    q_BKRH, k_BKSH, v_BKSH, o_BKRH, lse_BKR = (checkpoint_name(x, "attention") for x in arrays)
    return o_BKRH, (q_BKRH, k_BKSH, v_BKSH, segments, sinks_KG, o_BKRH, lse_BKR)


def _outputs(plan: _Plan, q_BKRH: Any, k_BKSH: Any, v_BKSH: Any, segments: Any, sinks_KG: Any) -> Any:
    """Return (outputs ``[B, K, R, H]``, log-sum-exp of the scores ``[B, K, R]``)."""
    spans = []
    for first, end in plan.spans:
        key = plan.first_key(first)
        k, v = k_BKSH[:, :, key:end], v_BKSH[:, :, key:end]
        block = functools.partial(_query_block, plan, q_BKRH, k, v, segments, sinks_KG, key)
        spans.append(_over_blocks(plan, first, end, None, block)[1])
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*spans, strict=True))


def _query_block(
    plan: _Plan, q_BKRH: Any, k_BKsH: Any, v_BKsH: Any, segments: Any, sinks_KG: Any, key: Any, _: None, start: Any
) -> tuple[None, tuple[jax.Array, jax.Array]]:
    """Return output and log-sum-exp of the block of queries at token ``start``, over keys that begin at ``key``."""
    if plan.slides:
        key = jnp.maximum(start + plan.block - plan.width, 0)  # at the start of a row, some come after the queries
        k_BKsH, v_BKsH = (_cut(x, key, plan.width, 2) for x in (k_BKsH, v_BKsH))
    q = _cut(q_BKRH, start * plan.group, plan.block * plan.group, 2)
    # Tied to q, masks are made anew in each layer. Else they are moved out of the scan over layers, and all held.
    q, segments, forbidden = jax.lax.optimization_barrier((q, segments, jnp.float32(FORBIDDEN)))
    allowed = plan.allowed(segments, start, plan.block, key, k_BKsH.shape[2])
    scores = layers.softcap(matmul(q, k_BKsH, transpose=True) * plan.scoring.scale, plan.scoring.softcap)
    scores = jnp.where(allowed, scores, forbidden)
    top = scores.max(axis=-1, keepdims=True)
    if sinks_KG is not None:
        sinks_KR1 = jnp.tile(sinks_KG.astype(jnp.float32), (1, plan.block))[..., None]
        top = jnp.maximum(top, sinks_KR1)
    p = fence(jnp.exp(scores - top).astype(q.dtype))
    total = p.astype(jnp.float32).sum(axis=-1, keepdims=True)
    if sinks_KG is not None:
        total += jnp.exp(sinks_KR1 - top)
    return None, ((matmul(p, v_BKsH) / total).astype(q.dtype), (top + jnp.log(total))[..., 0])


def _attend_backward(plan: _Plan, saved: Any, do_BKRH: jax.Array) -> tuple[Any, ...]:
    q_BKRH, k_BKSH, v_BKSH, segments, sinks_KG, o_BKRH, lse_BKR = saved
    delta_BKR = jnp.sum(do_BKRH.astype(jnp.float32) * o_BKRH.astype(jnp.float32), axis=-1)
    own, do_BKRH = do_BKRH.dtype, do_BKRH.astype(q_BKRH.dtype)
    keys = (k_BKSH, transposed(k_BKSH), v_BKSH)
    dq_BKHR, spans = jnp.zeros(q_BKRH.mT.shape, jnp.float32), []
    for first, end in plan.spans:
        rows = slice(first * plan.group, plan.end_query(end) * plan.group)
        queries = tuple(x[:, :, rows] for x in (q_BKRH, do_BKRH, lse_BKR, delta_BKR))
        block = functools.partial(_key_block, plan, queries, keys, segments, first)
        dq, parts = _over_blocks(plan, first, end, jnp.zeros(queries[0].mT.shape, jnp.float32), block)
        dq_BKHR += jnp.pad(dq, ((0, 0), (0, 0), (0, 0), (rows.start, q_BKRH.shape[2] - rows.stop)))
        spans.append(parts)
    dk_BKSH, dv_BKSH = (jnp.concatenate(parts, axis=2) for parts in zip(*spans, strict=True))
    dsinks_KG = None if sinks_KG is None else _sinks_gradient(sinks_KG, lse_BKR, delta_BKR)
    return fence(dq_BKHR.astype(own)).mT, dk_BKSH.astype(own), dv_BKSH.astype(own), None, dsinks_KG


def _sinks_gradient(sinks_KG: jax.Array, lse_BKR: jax.Array, delta_BKR: jax.Array) -> jax.Array:
    """Return the gradient of scores whose values are zero."""
    B, K, _ = lse_BKR.shape
    lse_BKTG, delta_BKTG = (x.reshape(B, K, -1, sinks_KG.shape[1]) for x in (lse_BKR, delta_BKR))
    p_BKTG = jnp.exp(sinks_KG.astype(jnp.float32)[:, None] - lse_BKTG)
    return -jnp.sum(p_BKTG * delta_BKTG, axis=(0, 2)).astype(sinks_KG.dtype)


def _key_block(
    plan: _Plan, queries: Any, keys: Any, segments: Any, query: Any, dq_BKHr: jax.Array, start: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Add to ``dq`` and return (dk, dv) of the block of keys at token ``start``, over queries that begin at ``query``.

    Formulas: arXiv 2307.08691, algorithm 2, with scores and probabilities transposed.
    """
    if plan.slides:
        query = jnp.minimum(start, plan.length - plan.width)  # at the end of a row, some come before the keys
        queries = tuple(_cut(x, query * plan.group, plan.width * plan.group, 2) for x in queries)
    q, do, lse_BKr, delta_BKr = queries
    k, v = (_cut(x, start, plan.block, 2) for x in (keys[0], keys[2]))
    k_BKHb = _cut(keys[1], start, plan.block, 3)
    k, segments = jax.lax.optimization_barrier((k, segments))  # as in `_query_block`
    allowed = plan.allowed(segments, query, q.shape[2] // plan.group, start, plan.block).mT
    scores = layers.softcap(matmul(k, q, transpose=True) * plan.scoring.scale, plan.scoring.softcap)
    p = fence(jnp.where(allowed, jnp.exp(scores - lse_BKr[:, :, None]), 0).astype(q.dtype))
    dp = matmul(v, do, transpose=True)
    slope = plan.scoring.scale  # of capped scores by products
    if plan.scoring.softcap is not None:
        slope *= 1 - jnp.square(scores / plan.scoring.softcap)
    ds = fence((p.astype(jnp.float32) * (dp - delta_BKr[:, :, None]) * slope).astype(q.dtype))
    before = _cut(dq_BKHr, query * plan.group, q.shape[2], 3) if plan.slides else dq_BKHr
    dq = before + matmul(k_BKHb, ds)
    if plan.slides:
        dq = jax.lax.dynamic_update_slice_in_dim(dq_BKHr, dq, query * plan.group, 3)
    return dq, (matmul(ds, q).astype(k.dtype), matmul(p, do).astype(v.dtype))


_differentiable_attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_differentiable_attend.defvjp(_attend_forward, _attend_backward)


def _over_blocks(plan: _Plan, first: int, end: int, carry: Any, step: Callable[..., Any]) -> tuple[Any, Any]:
    """Return the last carry, and the outputs of ``step(carry, start)`` for each block, joined along their axis 2."""
    if end - first == plan.block:
        return step(carry, first)
    carry, stacked = jax.lax.scan(step, carry, jnp.arange(first, end, plan.block))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:]), stacked)


def _cut(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def matmul(a: jax.Array, b: jax.Array, *, transpose: bool = False) -> jax.Array:
    """Return ``a @ b`` (or ``a @ b.mT``) in fp32 over two batch axes."""
    dimensions = (((3,), (3 if transpose else 2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

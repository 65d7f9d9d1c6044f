"""Attention where a row's tokens lie on several devices: what each device does inside ``shard_map``.

Queries stay where they are. ``across`` is plain XLA: keys and values are gathered at once, or go round in a ring from
device to device while each attends to those it has (Liu et al., arXiv 2310.01889), with one softmax over all that come.
Pairs of blocks in which no token sees another, be it for causality, windows or segments, are left out as they are met.
``gathering`` runs a kernel, whose masks are its own, on this device's queries and the whole row's keys and values.

Left out on purpose: fused kernels in the ring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from luthier.model import layers, zigzag
from luthier.model.attention_blockwise import FORBIDDEN, block_size, matmul
from luthier.model.segments import Segments, seen
from luthier.model.softmax import Softmax

MAX_BLOCK = 256  # tokens
NOWHERE = jnp.iinfo(jnp.int32).max


def gathering(kernel: Callable[..., jax.Array], *arrays: Any, **settings: Any) -> jax.Array:
    """Return ``kernel``'s output for this device's tokens; arrays and settings as in ``across``.

    The kernel is given ``ways``, over how many devices queries are spread. The gradient gathers keys and values again,
    so that no layer holds them.
    """

    def run(q_BtNH: jax.Array, k_BtKH: jax.Array, v_BtKH: jax.Array, segments: Segments, sinks_N: Any) -> jax.Array:
        k_BTKH, v_BTKH, segments = jax.tree.map(zigzag.gathered, (k_BtKH, v_BtKH, segments))
        ways = jax.lax.axis_size(zigzag.AXIS)
        return kernel(q_BtNH, k_BTKH, v_BTKH, segments, sinks_N, ways=ways, **settings)

    return jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names("attention"))(*arrays)


def across(
    q_BtNH: jax.Array,
    k_BtKH: jax.Array,
    v_BtKH: jax.Array,
    segments: Segments,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    ring: bool = False,
) -> jax.Array:
    """Return causal attention within segments, ``[B, t, N, H]``: of the t tokens of each row that lie on this device.

    Arguments as in ``attention``, of the same tokens.
    """
    how = _How(scale, window, softcap, ring)
    places_t = zigzag.own_places(q_BtNH.shape[1] * jax.lax.axis_size(zigzag.AXIS))
    return _attend(how, q_BtNH, k_BtKH, v_BtKH, _Tokens(places_t, segments), sinks_N)


class _How(NamedTuple):
    """How scores are made of products, as in ``attention``, and whether keys and values go round."""

    scale: float
    window: int | None
    softcap: float | None
    ring: bool


class _Tokens(NamedTuple):
    """What decides on who sees whom: places in the row ``[t]``, and segments."""

    places_t: jax.Array
    segments: Segments


class _Queries(NamedTuple):
    """Blocks of queries, n first, as ``[B, K, R, H]`` each, R being tokens times the query heads of a KV head."""

    q_nBKRH: jax.Array
    tokens_n: _Tokens


class _Keys(NamedTuple):
    """Keys and values of some tokens, ``[B, s, K, H]``."""

    k_BsKH: jax.Array
    v_BsKH: jax.Array
    tokens: _Tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens, sinks_N: Any) -> jax.Array:
    return _attend_forward(how, q, k, v, tokens, sinks_N)[0]


def _attend_forward(how: _How, q: Any, k: Any, v: Any, tokens: _Tokens, sinks_N: Any) -> Any:
    queries, keys = _queries(q, k.shape[2], tokens), _Keys(k, v, tokens)
    meet = functools.partial(_meet, how, queries)
    state = _start(queries, v.shape[-1], _by_row(sinks_N, queries))
    if how.ring:

        def turn(carry: Any, _: None) -> Any:
            state, keys = carry
            return (meet(state, keys), _passed_on(keys)), None

        (state, keys), _ = jax.lax.scan(turn, (state, keys), length=jax.lax.axis_size(zigzag.AXIS) - 1)
    else:
        keys = _everybodys(keys)
    o_nBKRH, lse_nBKR = meet(state, keys).mean()
    o = _tokens_first(o_nBKRH, q.shape[:3]).astype(q.dtype)
    # Named here, so that the "dots" policy of `layers.remat` keeps just what the gradient needs, as it lies on devices.
    q, k, v, o, lse_nBKR = (checkpoint_name(x, "attention") for x in (q, k, v, o, lse_nBKR))
    return o, (q, k, v, tokens, sinks_N, o, lse_nBKR)


def _attend_backward(how: _How, saved: Any, do: jax.Array) -> tuple[Any, ...]:
    q, k, v, tokens, sinks_N, o, lse_nBKR = saved
    queries, keys = _queries(q, k.shape[2], tokens), _Keys(k, v, tokens)
    do_nBKRH, o_nBKRH = (_queries(x, k.shape[2], tokens).q_nBKRH for x in (do, o))
    delta_nBKR = jnp.sum(do_nBKRH.astype(jnp.float32) * o_nBKRH.astype(jnp.float32), axis=-1)
    meet = functools.partial(_meet_back, how, (*queries, do_nBKRH.astype(q.dtype), lse_nBKR, delta_nBKR))
    dq_nBKRH = jnp.zeros(queries.q_nBKRH.shape, jnp.float32)
    if how.ring:

        def turn(carry: Any, _: None) -> Any:
            dq_nBKRH, keys, dkv = carry
            dq_nBKRH, more = meet(dq_nBKRH, keys)
            return (dq_nBKRH, _passed_on(keys), _passed_on(jax.tree.map(jnp.add, dkv, more))), None

        nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
        carry = (dq_nBKRH, keys, nothing)
        (dq_nBKRH, _, dkv), _ = jax.lax.scan(turn, carry, length=jax.lax.axis_size(zigzag.AXIS))
    else:
        dq_nBKRH, dkv = meet(dq_nBKRH, _everybodys(keys))
        dkv = jax.tree.map(zigzag.scattered, dkv)
    dsinks_N = None
    if sinks_N is not None:
        p_nBKR = jnp.exp(_by_row(sinks_N, queries) - lse_nBKR)
        dsinks_KbG = -jnp.sum(p_nBKR * delta_nBKR, axis=(0, 1)).reshape(k.shape[2], -1, q.shape[2] // k.shape[2])
        dsinks_N = dsinks_KbG.sum(axis=1).reshape(-1).astype(sinks_N.dtype)
    dk, dv = (gradient.astype(x.dtype) for gradient, x in zip(dkv, (k, v), strict=True))
    return _tokens_first(dq_nBKRH, q.shape[:3]).astype(q.dtype), dk, dv, None, dsinks_N


_attend.defvjp(_attend_forward, _attend_backward)


def _meet(how: _How, queries: _Queries, state_n: Softmax, keys: _Keys) -> Softmax:
    """Return the softmax of each block of queries with the scores of ``keys`` added."""
    blocks = _key_blocks(keys, queries)

    def of_queries(_: None, block: Any) -> Any:
        q, of_q, state = block

        def of_keys(state: Softmax, block: Any) -> Any:
            k, v, of_k = block
            allowed = _allowed(how, of_q, of_k)

            def update(state: Softmax) -> Softmax:
                scores, _ = _scores(how, q, k)
                return state.met(jnp.where(_by_head(allowed, q), scores, FORBIDDEN), v, q.dtype)

            return jax.lax.cond(jnp.any(allowed), update, lambda state: state, state), None

        return None, jax.lax.scan(of_keys, state, blocks)[0]

    return jax.lax.scan(of_queries, None, (*queries, state_n))[1]


def _meet_back(how: _How, queries_n: Any, dq_nBKRH: jax.Array, keys: _Keys) -> tuple[jax.Array, Any]:
    """Return ``dq`` with what comes of ``keys`` added, and (dk, dv), all fp32.

    Formulas: arXiv 2307.08691, algorithm 2.
    """
    blocks = _key_blocks(keys, _Queries(*queries_n[:2]))

    def of_keys(dq_nBKRH: jax.Array, block: Any) -> Any:
        k, v, of_k = block

        def of_queries(dkv: Any, block: Any) -> Any:
            dq, q, of_q, do, lse_BKR, delta_BKR = block
            allowed = _allowed(how, of_q, of_k)

            def update(carry: Any) -> Any:
                dq, dk, dv = carry
                scores, slope = _scores(how, q, k)
                p = jnp.where(_by_head(allowed, q), jnp.exp(scores - lse_BKR[..., None]), 0)
                ds = p * (matmul(do, v, transpose=True) - delta_BKR[..., None]) * slope
                p, ds = p.astype(q.dtype), ds.astype(q.dtype)
                return dq + matmul(ds, k), dk + matmul(ds.mT, q), dv + matmul(p.mT, do)

            dq, *dkv = jax.lax.cond(jnp.any(allowed), update, lambda carry: carry, (dq, *dkv))
            return tuple(dkv), dq

        nothing = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        dkv, dq_nBKRH = jax.lax.scan(of_queries, nothing, (dq_nBKRH, *queries_n))
        return dq_nBKRH, dkv

    dq_nBKRH, dkv = jax.lax.scan(of_keys, dq_nBKRH, blocks)
    length = keys.k_BsKH.shape[1]
    # Of [m, B, K, b, H], [B, s, K, H].
    return dq_nBKRH, tuple(jnp.concatenate(list(x), axis=2).swapaxes(1, 2)[:, :length] for x in dkv)


def _allowed(how: _How, of_q: _Tokens, of_k: _Tokens) -> jax.Array:
    """Return which tokens see which, ``[B or 1, b, s]``."""
    return seen(of_q.places_t, of_k.places_t, of_q.segments, of_k.segments, how.window)


def _scores(how: _How, q: jax.Array, k: jax.Array) -> tuple[jax.Array, Any]:
    """Return scores ``[B, K, R, S]`` and their derivative by the products."""
    scores = layers.softcap(matmul(q, k, transpose=True) * how.scale, how.softcap)
    slope: Any = how.scale
    return scores, slope if how.softcap is None else slope * (1 - jnp.square(scores / how.softcap))


def _by_head(allowed_Bbs: jax.Array, q_BKRH: jax.Array) -> jax.Array:
    """Return ``[B or 1, 1, R, S]``: the mask of a block for each of its rows."""
    return jnp.repeat(allowed_Bbs, q_BKRH.shape[2] // allowed_Bbs.shape[1], axis=1)[:, None]


def _start(queries: _Queries, size: int, sinks_KR: jax.Array | None) -> Softmax:
    """Return the softmax before any key: over nothing, or over the sinks."""
    shape = queries.q_nBKRH.shape[:-1]
    values = jnp.zeros((*shape, size), jnp.float32)
    if sinks_KR is None:
        return Softmax(jnp.full(shape, FORBIDDEN), jnp.zeros(shape), values)
    return Softmax(jnp.broadcast_to(sinks_KR, shape), jnp.ones(shape), values)


def _by_row(sinks_N: jax.Array | None, queries: _Queries) -> Any:
    """Return fp32 sinks ``[K, R]`` for the rows of a block."""
    if sinks_N is None:
        return None
    sinks_KG = sinks_N.astype(jnp.float32).reshape(queries.q_nBKRH.shape[2], -1)
    return jnp.tile(sinks_KG, (1, queries.q_nBKRH.shape[3] // sinks_KG.shape[1]))


def _queries(q_BtNH: jax.Array, kv_heads: int, tokens: _Tokens) -> _Queries:
    B, t, N, H = q_BtNH.shape
    size = block_size(B * N, t, 0, MAX_BLOCK)
    q_nBbNH = _in_blocks(q_BtNH, size, 1)
    q_nBbKGH = q_nBbNH.reshape(-1, B, size, kv_heads, N // kv_heads, H)
    q_nBKRH = q_nBbKGH.transpose(0, 1, 3, 2, 4, 5).reshape(-1, B, kv_heads, size * (N // kv_heads), H)
    return _Queries(q_nBKRH, _tokens_in_blocks(tokens, size, -1))


def _key_blocks(keys: _Keys, queries: _Queries) -> tuple[jax.Array, jax.Array, _Tokens]:
    """Return keys and values in blocks of ``[B, K, b, H]``, and what is known of their tokens."""
    _, B, K, R, _ = queries.q_nBKRH.shape
    size = block_size(B * K * R // queries.tokens_n.places_t.shape[1], keys.k_BsKH.shape[1], 0, MAX_BLOCK)
    k, v = (_in_blocks(x, size, 1).swapaxes(2, 3) for x in keys[:2])
    return k, v, _tokens_in_blocks(keys.tokens, size, NOWHERE)


def _tokens_in_blocks(tokens: _Tokens, size: int, padding: int) -> _Tokens:
    segments_n = jax.tree.map(lambda ids_Bt: _in_blocks(ids_Bt, size, 1), tokens.segments)
    return _Tokens(_in_blocks(tokens.places_t, size, 0, padding), segments_n)


def _in_blocks(x: jax.Array, size: int, axis: int, padding: int = 0) -> jax.Array:
    """Return ``[n, ...]`` with ``size`` entries of ``axis`` in each of n blocks."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, pad, constant_values=padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _tokens_first(x_nBKRH: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Return ``[B, t, N, H]`` of blocks of queries."""
    B, t, N = shape
    n, _, K, R, H = x_nBKRH.shape
    x_BnbKGH = x_nBKRH.reshape(n, B, K, R * K // N, N // K, H).transpose(1, 0, 3, 2, 4, 5)
    return x_BnbKGH.reshape(B, -1, N, H)[:, :t]


def _everybodys(keys: _Keys) -> _Keys:
    k, v, segments = jax.tree.map(zigzag.gathered, (keys.k_BsKH, keys.v_BsKH, keys.tokens.segments))
    return _Keys(k, v, _Tokens(jnp.arange(k.shape[1], dtype=jnp.int32), segments))


def _passed_on(tree: Any) -> Any:
    """Return what the device before this one has."""
    count = jax.lax.axis_size(zigzag.AXIS)
    return jax.lax.ppermute(tree, zigzag.AXIS, [(i, (i + 1) % count) for i in range(count)])

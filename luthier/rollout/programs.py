"""What the embedded engine runs on the device: reading prompts, drawing tokens, copying rows of the cache.

Each program is compiled once for each of a few shapes: rows and tokens come in buckets that the host chooses, and
lengths, settings and who is alive are arrays. Left out on purpose: which sequence lies in which row (``slots``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from luthier.model import cache
from luthier.model.cache import Cache, Past
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.rollout.adapters import gated
from luthier.rollout.sampling import Settings, draw, likeliest
from luthier.types import Array

NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Where each row of the cache stands.

    ``tokens_B`` is the last token of each sequence, which is not in the cache yet; ``lengths_B`` counts those that
    are, ``drawn_B`` the tokens of the completion so far and ``limits_B`` how many there may be. ``stops_BE`` are the
    tokens that end it, filled up with ``NO_TOKEN``; ``live_B`` is whether it goes on, ``adapters_B`` the number of its
    adapter.
    """

    tokens_B: Array
    lengths_B: Array
    drawn_B: Array
    limits_B: Array
    live_B: Array
    stops_BE: Array
    adapters_B: Array
    settings: Settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """What was drawn in up to S steps: row b's first columns, as many as its ``Rows.drawn_B`` grew by.

    The ``alternatives``, where asked for, are the A likeliest tokens of each step and their log-probs.
    """

    tokens_BS: Array
    logp_BS: Array
    softmax_logp_BS: Array
    alternative_ids_BSA: Array
    alternative_logp_BSA: Array


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames=("stored",))
def prefill(
    params: Tree,
    stored: Cache,
    tokens_PT: Array,
    rows_P: Array,
    lengths_P: Array,
    counts_P: Array,
    adapters_P: Array,
    *,
    model: Model,
    compute: Compute,
) -> Cache:
    """Read the first ``counts_P[p]`` of each row of tokens into cache row ``rows_P[p]``, after its ``lengths_P[p]``.

    ``adapters_P`` are the numbers of the adapters that read, see ``adapters.gated``.
    """
    with compute.precision():
        return model.extend(gated(params, adapters_P), tokens_PT, Past(stored, lengths_P, rows_P), counts_P, compute)[1]


@functools.partial(jax.jit, static_argnames=("model", "compute", "steps", "alternatives"), donate_argnames=("stored",))
def decode(
    params: Tree,
    stored: Cache,
    rows: Rows,
    impatient: Array,
    *,
    model: Model,
    compute: Compute,
    steps: int,
    alternatives: int,
) -> tuple[Cache, Rows, Chunk]:
    """Draw up to ``steps`` tokens for the sequences in the cache's first B rows.

    It ends sooner where none is alive any more or, if ``impatient``, where one has come to its end.
    """
    B, params = rows.tokens_B.shape[0], gated(params, rows.adapters_B)
    empty = Chunk(
        *(jnp.zeros((B, steps), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)),
        *(jnp.zeros((B, steps, alternatives), dtype) for dtype in (jnp.int32, jnp.float32)),
    )

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        step, _, now, _ = state
        ended = (now.live_B != rows.live_B).any()
        return (step < steps) & now.live_B.any() & ~(impatient & ended)

    def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, stored, now, chunk = state
        past, counts_B = Past(stored, now.lengths_B), now.live_B.astype(jnp.int32)
        hidden_B1D, stored = model.extend(params, now.tokens_B[:, None], past, counts_B, compute)
        with jax.named_scope("sampling"):
            now, columns = _drawn(now, model.project(params, hidden_B1D)[:, 0], alternatives)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=1)
            chunk = jax.tree.map(put, chunk, columns)
        return step + 1, stored, now, chunk

    with compute.precision():
        _, stored, rows, chunk = jax.lax.while_loop(goes_on, one, (jnp.int32(0), stored, rows, empty))
    return stored, rows, chunk


@functools.partial(jax.jit, donate_argnames=("stored",))
def copy(stored: Cache, sources_P: Array, targets_P: Array, count: Array) -> Cache:
    """Copy cache rows, in order; see ``cache.copy_rows``."""
    return cache.copy_rows(stored, sources_P, targets_P, count)


@jax.jit
def routes(stored: Cache, row: Array) -> Array:
    """Return the experts that the tokens in a row of the cache were sent to, ``[S, L, k]``."""
    # By gather, as in `cache.copy_rows`.
    routes_LR1Sk = stored[cache.ROUTES].k_LRKSH
    return routes_LR1Sk.at[:, row[None]].get(mode="clip")[:, 0, 0].swapaxes(0, 1)


def _drawn(now: Rows, logits_BV: jax.Array, alternatives: int) -> tuple[Rows, Chunk]:
    """Return the rows after a draw, and the draw as a chunk without its axis of steps."""
    tokens_B, logp_B, softmax_logp_B = draw(logits_BV, now.settings, now.drawn_B)
    tokens_B = jnp.where(now.live_B, tokens_B, now.tokens_B)
    others = likeliest(logits_BV, now.settings.temperature_B, alternatives) if alternatives else _none(tokens_B)
    grown_B = now.live_B.astype(jnp.int32)
    drawn_B = now.drawn_B + grown_B
    stopped_B = (tokens_B[:, None] == now.stops_BE).any(axis=1)
    rows = replace(
        now,
        tokens_B=tokens_B,
        lengths_B=now.lengths_B + grown_B,
        drawn_B=drawn_B,
        live_B=now.live_B & ~stopped_B & (drawn_B < now.limits_B),
    )
    return rows, Chunk(tokens_B, logp_B, softmax_logp_B, *others)


def _none(tokens_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (tokens_B.shape[0], 0)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

"""Drawing tokens from logits, on the device, inside the decode loop.

Nothing is sorted. Of a row only ``p = exp((logit - max) / temperature)`` is used, whose largest entry is 1, and all
three filters are a least ``p``: ``min_p`` is one as it stands, and those of top-k and top-p are found by bisection over
the bit patterns of the floats between 0 and 1, which are ordered as the floats are. The draw is an inverse CDF in two
levels: the vocabulary is laid out as R rows of C columns, a column is drawn by its sum, then a row in that column, with
one uniform number each; so a batch needs two random numbers a row rather than one a token.

What comes out for a row depends neither on the rows beside it nor on logits of -inf behind its vocabulary: sums are
taken in one order, and a row's bisection stands still while the others' go on.

Left out on purpose: penalties, biases and grammars, which change the logits before they get here; and checking the
settings, which the engine does on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from luthier.types import Array

COLUMNS = 256
_BITS_OF_ONE = 0x3F800000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """``rollout.engine.Sampling`` of each row, as arrays.

    ``key_B2`` is the uint32 data of a threefry key, as ``jax.random.key_data`` gives it; the noise of a row at a step
    is a function of its key and the step's number alone.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    key_B2: Array


class Drawn(NamedTuple):
    """A token for each row, with its log-prob as drawn (filters and all) and under the whole softmax."""

    tokens_B: jax.Array
    logp_B: jax.Array
    softmax_logp_B: jax.Array


def draw(logits_BV: jax.Array, settings: Settings, step_B: jax.Array) -> Drawn:
    """Draw a token from each row of fp32 logits, as ``rollout.engine.Sampling`` says.

    Where ``temperature_B`` is 0 it is the likeliest token, the first of equals; its ``logp_B`` is 0 and its
    ``softmax_logp_B`` that at temperature 1. A row of which no logit is finite gives some token and log-probs of NaN.
    """
    greedy_B = settings.temperature_B < jnp.finfo(jnp.float32).tiny  # smaller ones count as 0 in a division too
    temperature_B = jnp.where(greedy_B, 1.0, settings.temperature_B)
    logits_BRC = _in_columns(logits_BV.astype(jnp.float32))
    top_B = logits_BRC.max(1).max(1)
    p_BRC = jnp.exp((logits_BRC - top_B[:, None, None]) / temperature_B[:, None, None])
    least_B = _least_kept(p_BRC, settings, greedy_B)
    sums_BC = _above(p_BRC, least_B).sum(1)
    uniform_B2 = _uniform(settings.key_B2, step_B)
    column_B = _invert(sums_BC, uniform_B2[:, 0])
    of_column_BR = jnp.take_along_axis(p_BRC, column_B[:, None, None], axis=2)
    row_B = _invert(_above(of_column_BR, least_B)[:, :, 0], uniform_B2[:, 1])
    likeliest_B = jax.lax.cond(greedy_B.any(), _first_at, lambda *_: jnp.zeros_like(row_B), logits_BV, top_B)
    tokens_B = jnp.where(greedy_B, likeliest_B, row_B * COLUMNS + column_B)
    logit_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
    scaled_B = (logit_B - top_B) / temperature_B
    logp_B = jnp.where(greedy_B, 0.0, scaled_B - jnp.log(sums_BC.sum(1)))
    return Drawn(tokens_B, logp_B, scaled_B - jnp.log(p_BRC.sum(1).sum(1)))


def likeliest(logits_BV: jax.Array, temperature_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the ``count`` likeliest tokens of each row and their log-probs under its whole softmax.

    Returns ``(ids_BA, logp_BA)``, likeliest first; the softmax is that at ``temperature_B``, or at 1 where it is 0.
    """
    temperature_B1 = jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    logits_BA, ids_BA = jax.lax.top_k(logits_BV.astype(jnp.float32), count)
    top_B1 = logits_BA[:, :1]
    total_B = jnp.exp((_in_columns(logits_BV) - top_B1[..., None]) / temperature_B1[..., None]).sum(1).sum(1)
    return ids_BA, (logits_BA - top_B1) / temperature_B1 - jnp.log(total_B)[:, None]


def _in_columns(logits_BV: jax.Array) -> jax.Array:
    """Lay the vocabulary out as ``[B, R, COLUMNS]``; a sum over rows is then one vector operation after another."""
    rows = -(-logits_BV.shape[1] // COLUMNS)
    behind = rows * COLUMNS - logits_BV.shape[1]
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, behind)), constant_values=-jnp.inf)
    return padded_BV.reshape(logits_BV.shape[0], rows, COLUMNS)


def _above(p_BRC: jax.Array, least_B: jax.Array) -> jax.Array:
    return jnp.where(p_BRC >= least_B[:, None, None], p_BRC, 0.0)


def _least_kept(p_BRC: jax.Array, settings: Settings, greedy_B: jax.Array) -> jax.Array:
    """Return the least ``p`` that all three filters keep."""
    width = p_BRC.shape[1] * p_BRC.shape[2]
    by_count_B = (settings.top_k_B > 0) & (settings.top_k_B < width) & ~greedy_B
    by_mass_B = (settings.top_p_B < 1) & ~greedy_B

    def top_k(least_B: jax.Array) -> jax.Array:
        def count(pivot_B: jax.Array) -> jax.Array:
            return jnp.where(p_BRC >= pivot_B[:, None, None], 1.0, 0.0).sum(1).sum(1)

        return _bisect(count, settings.top_k_B.astype(jnp.float32), least_B, by_count_B)

    def top_p(least_B: jax.Array) -> jax.Array:
        def mass(pivot_B: jax.Array) -> jax.Array:
            return _above(p_BRC, pivot_B).sum(1).sum(1)

        return _bisect(mass, settings.top_p_B * mass(least_B), least_B, by_mass_B)

    least_B = jnp.zeros_like(settings.min_p_B)
    least_B = jax.lax.cond(by_count_B.any(), top_k, lambda same_B: same_B, least_B)
    least_B = jax.lax.cond(by_mass_B.any(), top_p, lambda same_B: same_B, least_B)
    return jnp.maximum(least_B, settings.min_p_B)


def _bisect(
    measure: Callable[[jax.Array], jax.Array], goal_B: jax.Array, least_B: jax.Array, wanted_B: jax.Array
) -> jax.Array:
    """Return a float in [least, 1] that keeps what the largest one keeps of which ``measure`` still is ``goal_B``.

    ``measure`` falls as its argument grows. Rows that are not ``wanted_B`` get ``least_B``; a row stands still once it
    is settled, however many passes the others need.
    """

    def open_rows(low_B: jax.Array, high_B: jax.Array, at_low_B: jax.Array) -> jax.Array:
        return wanted_B & (high_B - low_B > 1) & (at_low_B != goal_B)

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low_B, high_B, at_low_B = state
        open_B = open_rows(*state)
        middle_B = low_B + (high_B - low_B) // 2
        there_B = measure(jax.lax.bitcast_convert_type(middle_B, jnp.float32))
        reached_B = there_B >= goal_B
        up_B, down_B = open_B & reached_B, open_B & ~reached_B  # so that NaN ends, too
        return (
            jnp.where(up_B, middle_B, low_B),
            jnp.where(down_B, middle_B, high_B),
            jnp.where(up_B, there_B, at_low_B),
        )

    low_B = jax.lax.bitcast_convert_type(least_B, jnp.int32)
    start = (low_B, jnp.full_like(low_B, _BITS_OF_ONE + 1), jnp.full_like(least_B, jnp.inf))
    found_B, _, _ = jax.lax.while_loop(lambda state: open_rows(*state).any(), halve, start)
    return jax.lax.bitcast_convert_type(found_B, jnp.float32)


def _invert(mass_BX: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Return an index with probability in proportion to ``mass_BX``; never one without mass."""
    below_BX = jnp.cumsum(mass_BX, axis=1)
    some_BX = mass_BX > 0
    reached_BX = some_BX & (below_BX > uniform_B[:, None] * below_BX[:, -1:])
    # Rounding can leave the sum short of the number drawn, or let it pass at an entry without mass.
    last_B = jnp.where(some_BX, jnp.arange(mass_BX.shape[1]), 0).max(1)
    return jnp.where(reached_BX.any(1), jnp.argmax(reached_BX, axis=1), last_B).astype(jnp.int32)


def _uniform(key_B2: jax.Array, step_B: jax.Array) -> jax.Array:
    """Return two numbers in [0, 1) for each row, from its key and step."""

    def of_row(key_2: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, step), (2,))

    return jax.vmap(of_row)(key_B2, step_B)


def _first_at(logits_BV: jax.Array, top_B: jax.Array) -> jax.Array:
    """Return where each row first has its largest logit: ``argmax``, as two reductions that a CPU does in vectors."""
    width = logits_BV.shape[1]
    places_BV = jnp.where(logits_BV == top_B[:, None], jnp.arange(width, dtype=jnp.int32), width - 1)
    return places_BV.min(1)

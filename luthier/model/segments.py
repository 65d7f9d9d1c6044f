"""Which tokens of a row belong together, as attention is told.

Families pass ``Segments`` on without looking inside. Left out on purpose: prefixes of prefixes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Prefixed(NamedTuple):
    """Segments of which some go on from another segment of their row, as completions of one prompt do.

    ``own_BT`` numbers the segments, 0 for padding; ``prefix_BT`` is the segment that a token's own goes on from, and
    its own where it goes on from none. A prefix stands in the row before all that go on from it, but not next to them:
    so ``positions_BT`` tells how far apart tokens are, which a layer with a window asks for.
    """

    own_BT: jax.Array
    prefix_BT: jax.Array
    positions_BT: jax.Array | None = None


Segments = jax.Array | Prefixed | None
"""Numbers ``[B, T]`` of segments that stand alone, ``Prefixed`` ones, or None: rows of one segment each."""


def related(queries: Any, keys: Any, window: int | None) -> jax.Array:
    """Return ``[B, Q, S]``: whether each key lies in its query's segment or in the one which that goes on from.

    Of prefixed segments, only the keys are that lie in the ``window`` of positions that ends with the query; elsewhere
    the order in the row says that. ``queries`` and ``keys`` are parts of the same ``Segments``, not None.

    Raises ValueError for a window over prefixed segments that lack positions.
    """
    if not isinstance(queries, Prefixed):
        return queries[:, :, None] == keys[:, None, :]
    own_BS = keys.own_BT[:, None, :]
    related_BQS = (queries.own_BT[:, :, None] == own_BS) | (queries.prefix_BT[:, :, None] == own_BS)
    if window is None:
        return related_BQS
    if queries.positions_BT is None:
        raise ValueError("attention: prefixed segments lack positions, by which a window is counted")
    return related_BQS & (queries.positions_BT[:, :, None] - keys.positions_BT[:, None, :] < window)


def seen(places_Q: jax.Array, places_S: jax.Array, queries: Any, keys: Any, window: int | None) -> jax.Array:
    """Return ``[B or 1, Q, S]``: whether each key is seen by each query, given their places in the row.

    ``queries`` and ``keys`` are their parts of the same ``Segments``, None too.
    """
    distance = places_Q[:, None] - places_S
    seen_QS = distance >= 0
    if window is not None and not isinstance(queries, Prefixed):
        seen_QS &= distance < window
    return seen_QS[None] if queries is None else seen_QS & related(queries, keys, window)

"""Which tokens of a row belong together, as attention is told.

Families pass ``Segments`` on without looking inside. Left out on purpose: prefixes of prefixes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Prefixed(NamedTuple):
    """Segments of which some go on from another segment of their row, as completions of one prompt do.

    ``own_BT`` numbers the segments, 0 for padding; ``prefix_BT`` is the segment that a token's own goes on from, and
    its own where it goes on from none. A prefix stands in the row before all that go on from it.
    """

    own_BT: jax.Array
    prefix_BT: jax.Array


Segments = jax.Array | Prefixed | None
"""Numbers ``[B, T]`` of segments that stand alone, ``Prefixed`` ones, or None: rows of one segment each."""


def related(queries: Any, keys: Any) -> jax.Array:
    """Return ``[B, Q, S]``: whether each key lies in its query's segment or in the one which that goes on from.

    ``queries`` and ``keys`` are parts of the same ``Segments``, not None.
    """
    if not isinstance(queries, Prefixed):
        return queries[:, :, None] == keys[:, None, :]
    own_BS = keys.own_BT[:, None, :]
    return (queries.own_BT[:, :, None] == own_BS) | (queries.prefix_BT[:, :, None] == own_BS)

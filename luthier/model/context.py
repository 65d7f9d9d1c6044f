"""What a block of a layer is told while it runs, besides its weights and its input.

Left out on purpose: anything that lasts longer than one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from luthier.model.cache import LayerPast
from luthier.model.compute import Compute
from luthier.model.dense import dense
from luthier.model.layers import Rotation
from luthier.model.rope import Rope
from luthier.model.segments import Segments


@dataclass(frozen=True)
class Here:
    """One layer's surroundings.

    ``positions_BT`` counts the tokens of each sequence. ``ropes`` has the rotations of each kind in the model, ``past``
    what is cached of the layer, None where nothing goes before. ``routes_BTk`` gives the experts of each token, which
    are chosen here where it is None. ``context`` is ``attention``'s: None where each device has whole rows.
    """

    positions_BT: jax.Array
    segments: Segments
    compute: Compute
    ropes: Mapping[Rope, Rotation]
    past: LayerPast | None = None
    routes_BTk: jax.Array | None = None
    context: str | None = None

    def dense(self, einsum: str, x: jax.Array, w: Any, *, out_dtype: Any = None) -> jax.Array:
        """Return ``dense`` in the type that weights are multiplied in, whatever is fp32 around it."""
        return dense(einsum, x, w, dtype=self.compute.dtype, out_dtype=out_dtype)

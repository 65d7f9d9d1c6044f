"""Norms as a description says them; the arithmetic is in ``layers``.

Left out on purpose: norms with a bias or a mean taken away, which no family here has.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from luthier.model.layers import rms_norm
from luthier.model.param import Param


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm; with ``plus_one`` the stored weight is what is added to 1 (Gemma)."""

    eps: float
    plus_one: bool = False

    def param(self, tensor: str, size: int) -> Param:
        """Declare its weight, of ``size`` numbers."""
        return Param(tensor, "d -> d", ("norm",), (size,), init="zeros" if self.plus_one else "ones")

    def apply(self, scale_D: jax.Array, x: jax.Array) -> jax.Array:
        """Return ``x`` normed on its last axis."""
        return rms_norm(x, scale_D.astype(jnp.float32) + 1 if self.plus_one else scale_D, self.eps)

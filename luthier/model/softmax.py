"""A softmax over scores that come in parts (Milakov and Gimelshein, arXiv 1805.02867).

Left out on purpose: gradients, which are written out by those who have any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from luthier.model.attention_blockwise import matmul

TINY = 1e-30


class Softmax(NamedTuple):
    """Of the scores so far: the greatest, the sum of exponentials against it, and the values weighted by those."""

    top_BKR: jax.Array
    total_BKR: jax.Array
    values_BKRH: jax.Array

    def met(self, scores_BKRS: jax.Array, v_BKSH: jax.Array, dtype: Any) -> Softmax:
        """Return what it is with more scores; they weigh values in ``dtype``."""
        top_BKR = jnp.maximum(self.top_BKR, scores_BKRS.max(axis=-1))
        p = jnp.exp(scores_BKRS - top_BKR[..., None])
        fade_BKR = jnp.exp(self.top_BKR - top_BKR)
        return Softmax(
            top_BKR,
            self.total_BKR * fade_BKR + p.sum(axis=-1),
            self.values_BKRH * fade_BKR[..., None] + matmul(p.astype(dtype), v_BKSH),
        )

    def mean(self) -> tuple[jax.Array, jax.Array]:
        """Return the mean value ``[B, K, R, H]`` and the log-sum-exp ``[B, K, R]``; 0 where there were no scores."""
        total_BKR = jnp.maximum(self.total_BKR, TINY)
        return self.values_BKRH / total_BKR[..., None], self.top_BKR + jnp.log(total_BKR)

"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

import jax

from luthier.algorithms import linear, masked
from luthier.types import Batch, Loss


@linear
def sft(logp_BT: jax.Array, batch: Batch) -> Loss:
    """Return the sum of ``-logp`` over trained tokens, weighed by their number.

    ``logp_BT`` is the log-prob of the token at each position given those before it.
    """
    return Loss(sum=-masked.masked_sum(logp_BT, batch.mask_BT), weight=masked.count(batch.mask_BT))

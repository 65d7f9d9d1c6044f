"""How far the trainer's log-probs of sampled tokens lie from the sampler's.

Both score the same ids with the same weights, so the difference is rounding where both are ours, and more where the
sampler is another engine, or older. Left out on purpose: correcting for it, which is the policy loss's matter.
"""

from __future__ import annotations

import jax.numpy as jnp

from luthier.algorithms import masked
from luthier.types import Array, Loss


def mismatch(sampler_logp_BT: Array, trainer_logp_BT: Array, mask_BT: Array) -> Loss:
    """Return what measures the difference on the tokens of ``mask_BT``, under the names it is logged by.

    It is a loss of nothing, whose metrics and maxima add up over micro-batches as those of any. ``logp_difference`` is
    absolute; ``importance_ratio`` is ``exp(trainer - sampler)`` of single tokens. ``kl`` is the k3 estimate of
    KL(sampler, trainer), the mean of ``ratio - 1 - log ratio`` (Schulman, joschu.net/blog/kl-approx.html). Where the
    mask is empty, all are 0.
    """
    tokens = masked.count(jnp.asarray(mask_BT))
    log_ratio_BT = jnp.where(mask_BT, jnp.asarray(trainer_logp_BT) - jnp.asarray(sampler_logp_BT), 0.0)
    difference_BT, ratio_BT = jnp.abs(log_ratio_BT), jnp.where(mask_BT, jnp.exp(log_ratio_BT), 0.0)
    means = {
        "sampling/logp_difference/mean": difference_BT,
        "sampling/importance_ratio/mean": ratio_BT,
        "sampling/kl": jnp.expm1(log_ratio_BT) - log_ratio_BT,
    }
    return Loss(
        sum=jnp.float32(0),
        weight=jnp.float32(0),
        metrics={name: (jnp.sum(values_BT), tokens) for name, values_BT in means.items()},
        maxima={
            "sampling/logp_difference/max": difference_BT.max(),
            "sampling/importance_ratio/max": ratio_BT.max(),
        },
    )

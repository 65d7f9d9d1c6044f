"""How far the trainer's log-probs of sampled tokens lie from the sampler's.

Both score the same ids with the same weights, so the difference is rounding where both are ours, and more where the
sampler is another engine, or older. Left out on purpose: correcting for it, which is the policy loss's matter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from luthier.types import Array


def mismatch(sampler_logp_BT: Array, trainer_logp_BT: Array, mask_BT: Array) -> dict[str, jax.Array]:
    """Return scalars that measure the difference on the tokens of ``mask_BT``, under the names they are logged by.

    ``logp_difference`` is absolute; ``importance_ratio`` is ``exp(trainer - sampler)`` of single tokens. ``kl`` is the
    k3 estimate of KL(sampler, trainer), ``mean(ratio - 1 - log ratio)`` (Schulman, joschu.net/blog/kl-approx.html).
    All are 0 (ratios 1) where the mask is empty.
    """
    count = jnp.maximum(jnp.sum(mask_BT), 1)
    log_ratio_BT = jnp.where(mask_BT, jnp.asarray(trainer_logp_BT) - jnp.asarray(sampler_logp_BT), 0.0)
    difference_BT, ratio_BT = jnp.abs(log_ratio_BT), jnp.exp(log_ratio_BT)
    some = jnp.any(mask_BT)
    return {
        "sampling/logp_difference/mean": difference_BT.sum() / count,
        "sampling/logp_difference/max": difference_BT.max(),
        "sampling/importance_ratio/mean": jnp.where(some, jnp.where(mask_BT, ratio_BT, 0).sum() / count, 1.0),
        "sampling/importance_ratio/min": jnp.where(some, jnp.where(mask_BT, ratio_BT, jnp.inf).min(), 1.0),
        "sampling/importance_ratio/max": jnp.where(some, jnp.where(mask_BT, ratio_BT, -jnp.inf).max(), 1.0),
        "sampling/kl": jnp.where(mask_BT, ratio_BT - 1 - log_ratio_BT, 0).sum() / count,
    }

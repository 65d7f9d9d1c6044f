"""What policy losses are made of: probability ratios, clips, KL estimates, the sampler's correction, sums.

All are pure functions of log-probs ``[B, T]``; ``mask_BT`` is true on trained tokens, of which there is one advantage a
sequence. Whatever stands outside the mask was set to 0 by ``cleaned`` on the way in, so that no NaN from there reaches
a gradient (0 times NaN is NaN). Left out on purpose: which terms make which algorithm, which ``policy`` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from luthier.algorithms import masked
from luthier.types import Rollouts

MAX_LOG_RATIO = 20.0
"""Log-ratios count up to here, where a ratio is 5e8: past 88 ``exp`` overflows, and its gradient is NaN if clipped."""


@dataclass(frozen=True)
class TokenLoss:
    """A loss of each token, and values of each token whose means over trained tokens are logged, by name."""

    loss_BT: jax.Array
    means: dict[str, jax.Array] = field(default_factory=dict)


def cleaned(
    logp_BT: jax.Array, batch: Rollouts, entropy_BT: jax.Array | None
) -> tuple[jax.Array, Rollouts, jax.Array | None]:
    """Return the arguments in fp32, with 0 wherever nothing is trained, and the mask as bool.

    Where there is no old policy, the current one as it stands takes its place.
    """
    mask_BT = batch.mask_BT.astype(bool)

    def inside(x_BT: jax.Array) -> jax.Array:
        return jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)

    def inside_or_none(x_BT: jax.Array | None) -> jax.Array | None:
        return None if x_BT is None else inside(x_BT)

    rollouts = dataclasses.replace(
        batch,
        mask_BT=mask_BT,
        sampler_logp_BT=inside(batch.sampler_logp_BT),
        old_logp_BT=inside(jax.lax.stop_gradient(logp_BT) if batch.old_logp_BT is None else batch.old_logp_BT),
        reference_logp_BT=inside_or_none(batch.reference_logp_BT),
        advantages_B=batch.advantages_B.astype(jnp.float32),
    )
    return inside(logp_BT), rollouts, inside_or_none(entropy_BT)


def ratio_of(log_ratio: jax.Array) -> jax.Array:
    """Return ``exp(log_ratio)``, constant past ``MAX_LOG_RATIO`` either way."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def token_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """Return each token's ``pi / pi_old``."""
    return ratio_of(logp_BT - old_logp_BT)


def sequence_ratio(logp_BT: jax.Array, old_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return ``(pi(y) / pi_old(y)) ^ (1 / |y|)`` of each sequence, at each of its tokens (2507.18071, eq. 7)."""
    log_ratio_B = masked.sequence_mean(logp_BT - old_logp_BT, mask_BT)
    return jnp.broadcast_to(ratio_of(log_ratio_B)[:, None], logp_BT.shape)


def clipped_surrogate(
    ratio_BT: jax.Array, advantages_B: jax.Array, epsilon_low: float, epsilon_high: float, dual_clip: float | None
) -> TokenLoss:
    """Return ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` (1707.06347, eq. 7; bounds apart: 2503.14476).

    The clip is active where it alone decides: a positive advantage and a ratio over the upper bound, or a negative one
    under the lower. With ``dual_clip`` c, ``r`` counts as c where it is greater and the advantage is negative
    (1912.09729), where the plain clip knows no bound. Nothing is learnt from a token whose clip is active.
    """
    advantages_B1 = advantages_B[:, None]
    low_BT = (advantages_B1 < 0) & (ratio_BT < 1 - epsilon_low)
    high_BT = (advantages_B1 > 0) & (ratio_BT > 1 + epsilon_high)
    means = clip_shares(low_BT, high_BT)
    used_BT = jnp.where(low_BT, 1 - epsilon_low, jnp.where(high_BT, 1 + epsilon_high, ratio_BT))
    if dual_clip is not None:
        dual_BT = (advantages_B1 < 0) & (ratio_BT > dual_clip)
        means["clip_ratio/dual_mean"] = dual_BT
        used_BT = jnp.where(dual_BT, dual_clip, used_BT)
    return TokenLoss(-used_BT * advantages_B1, {"ratio/mean": ratio_BT} | means)


def clip_shares(low_BT: jax.Array, high_BT: jax.Array) -> dict[str, jax.Array]:
    """Name the tokens whose clip is active: at the lower bound, at the upper, at either."""
    return {
        "clip_ratio/low_mean": low_BT,
        "clip_ratio/high_mean": high_BT,
        "clip_ratio/region_mean": low_BT | high_BT,
    }


def weighted_likelihood(weight_BT: jax.Array, advantages_B: jax.Array, logp_BT: jax.Array) -> jax.Array:
    """Return ``-sg(w) A log pi``: a policy gradient whose weights are constants."""
    return -jax.lax.stop_gradient(weight_BT) * advantages_B[:, None] * logp_BT


def k1(logp_BT: jax.Array, reference_logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """Return ``log(pi / pi_ref)``. Its mean is the KL divergence, but the mean of its gradient is 0.

    The gradient is that of ``log pi``, whose mean under the policy vanishes: in a loss this adds noise and no pull
    towards the reference, and is here for comparison alone.
    """
    del old_logp_BT
    return logp_BT - reference_logp_BT


def k2(logp_BT: jax.Array, reference_logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """Return half the square of ``log(pi / pi_ref)``: a biased estimate whose gradient is unbiased on-policy."""
    del old_logp_BT
    return jnp.square(logp_BT - reference_logp_BT) / 2


def k3(logp_BT: jax.Array, reference_logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """Return ``x - 1 - log x`` with ``x = pi_ref / pi`` (2402.03300, eq. 4; Schulman, joschu.net/blog/kl-approx.html).

    Unbiased and never negative, on-policy; its gradient is that of the KL divergence the other way round.
    """
    del old_logp_BT
    log_ratio_BT = jnp.clip(reference_logp_BT - logp_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(log_ratio_BT) - log_ratio_BT


def k3_iw(logp_BT: jax.Array, reference_logp_BT: jax.Array, old_logp_BT: jax.Array) -> jax.Array:
    """Return ``pi / pi_old`` times ``k3``, differentiated through both (2512.02556, section 3.1).

    Value and gradient are unbiased for tokens drawn from the old policy, on-policy included, given the tokens before.
    """
    return token_ratio(logp_BT, old_logp_BT) * k3(logp_BT, reference_logp_BT, old_logp_BT)


KL_ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3-iw": k3_iw,
}
"""Estimates of KL(pi, reference) at each token, from log-probs of policy, reference and old policy."""


def sampler_correction(batch: Rollouts, level: str, cap: float) -> tuple[jax.Array, jax.Array]:
    """Return each token's weight for having been drawn by the sampler, and where the cap is passed.

    The ratio is ``pi_old / pi_sampler``. At level ``"token"`` it is the token's, cut at ``cap`` (truncated importance
    sampling). At level ``"sequence"`` it is the product over the sequence, for all its tokens, and a sequence over
    ``cap`` weighs 0 (masked importance sampling).
    """
    log_ratio_BT = batch.old_logp_BT - batch.sampler_logp_BT
    if level == "token":
        ratio_BT = ratio_of(log_ratio_BT)
        weight_BT, capped_BT = jnp.minimum(ratio_BT, cap), ratio_BT > cap
    elif level == "sequence":
        ratio_B1 = ratio_of(masked.sequence_sum(log_ratio_BT, batch.mask_BT))[:, None]
        ratio_BT = jnp.broadcast_to(ratio_B1, log_ratio_BT.shape)
        weight_BT, capped_BT = jnp.where(ratio_BT > cap, 0.0, ratio_BT), ratio_BT > cap
    else:
        raise ValueError(f"importance sampling is corrected by `token` or by `sequence`, not by `{level}`")
    return jax.lax.stop_gradient(weight_BT), capped_BT


def regularised(
    part: TokenLoss,
    logp_BT: jax.Array,
    batch: Rollouts,
    entropy_BT: jax.Array | None,
    *,
    beta: float = 0.0,
    kl_estimator: str = "k3-iw",
    entropy_coefficient: float = 0.0,
    importance_sampling_correction: str = "none",
    importance_sampling_cap: float = 2.0,
) -> TokenLoss:
    """Return ``weight * (loss + beta * KL) - entropy_coefficient * entropy`` of each token.

    The weight corrects expectations under the old policy for tokens that the sampler drew; the KL term is one of them.
    The entropy is the exact one of each token's distribution, so it has none. Also logged are ``k3`` and the entropy,
    where there is a reference and an entropy.

    Raises:
        ValueError: ``beta`` without a reference, or ``entropy_coefficient`` without an entropy.
    """
    loss_BT, means = part.loss_BT, dict(part.means)
    if batch.reference_logp_BT is not None:
        against = (logp_BT, batch.reference_logp_BT, batch.old_logp_BT)
        means["kl"] = k3(*against)
        if beta:
            loss_BT = loss_BT + beta * KL_ESTIMATORS[kl_estimator](*against)
    elif beta:
        raise ValueError(f"beta={beta} needs the reference's log-probs, and the batch has none")
    if importance_sampling_correction != "none":
        weight_BT, capped_BT = sampler_correction(batch, importance_sampling_correction, importance_sampling_cap)
        loss_BT = weight_BT * loss_BT
        means["importance_sampling/capped_mean"] = capped_BT
    if entropy_BT is not None:
        means["entropy"] = entropy_BT
        if entropy_coefficient:
            loss_BT = loss_BT - entropy_coefficient * entropy_BT
    elif entropy_coefficient:
        raise ValueError(f"entropy_coefficient={entropy_coefficient} needs the entropy, which is None")
    return TokenLoss(loss_BT, means)


def aggregated(
    loss_BT: jax.Array, mask_BT: jax.Array, loss_aggregation: str, completion_length: int | None
) -> tuple[jax.Array, jax.Array]:
    """Return the sum over the batch and the weight that it is divided by, once all micro-batches were added.

    ``"sequence"``: mean over each sequence's tokens, then over sequences (2402.03300). ``"token"``: mean over all
    tokens (2503.14476). ``"constant"``: each sequence's sum over the constant ``completion_length``, then the mean over
    sequences (2503.20783). ``"sequence-sum"``: the same without the constant. Sequences without a trained token are not
    counted.

    Raises:
        ValueError: ``"constant"`` without ``completion_length``, or an aggregation that is none of these.
    """
    if loss_aggregation == "token":
        return masked.masked_sum(loss_BT, mask_BT), masked.count(mask_BT)
    sequences = masked.count(masked.nonempty(mask_BT))
    if loss_aggregation == "sequence":
        return jnp.sum(masked.sequence_mean(loss_BT, mask_BT)), sequences
    total = masked.masked_sum(loss_BT, mask_BT)
    if loss_aggregation == "sequence-sum":
        return total, sequences
    if loss_aggregation != "constant" or completion_length is None:
        raise ValueError(f"loss_aggregation={loss_aggregation!r} with completion_length={completion_length}")
    return total / completion_length, sequences

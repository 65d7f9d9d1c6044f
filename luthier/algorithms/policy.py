"""Policy losses: grpo, dr-grpo, dapo, gspo, gspo-token, cispo, rloo, reinforce.

An algorithm is one function from the current log-probs and a batch to a loss for each token; its keyword defaults are
its settings. ``algorithm`` makes it whole: what is outside the mask is cleared, KL, entropy and the sampler's
correction are added (their keywords are settings too), and tokens are summed.

In what follows ``r = pi / pi_old`` of a token, ``A`` is the advantage of its sequence ``y``, and all losses are to be
minimised. Left out on purpose: how rewards become advantages (``advantages``), and what happens to groups and
completions before there is a batch, of which ``HABITS`` names only what each paper does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from luthier.algorithms import masked, policy_terms
from luthier.algorithms.policy_terms import TokenLoss
from luthier.types import Loss, Rollouts


@dataclass(frozen=True)
class Habits:
    """What an algorithm wants of the loop, by its paper: values of the keys of these names."""

    advantages: str
    zero_variance_groups: str = "keep"
    truncated_completions: str = "keep"


ALGORITHMS: dict[str, Callable[..., Loss]] = {}
"""Losses by name, each ``(logp_BT, batch, entropy_BT=None, **settings) -> Loss``."""

HABITS: dict[str, Habits] = {}
"""Habits by name."""


def settings(name: str) -> dict[str, Any]:
    """Return each setting of an algorithm and its default, those of the shared terms included."""
    return _keywords(ALGORITHMS[name])


def algorithm(
    habits: Habits, *, loss_aggregation: str, aggregation_is_a_setting: bool = True
) -> Callable[[Callable[..., TokenLoss]], Callable[..., Loss]]:
    """Register a function ``(logp_BT, batch, *, settings) -> TokenLoss`` as the algorithm of its name, made whole.

    Args:
        habits: What its paper does outside of the loss.
        loss_aggregation: How tokens are summed, as in ``policy_terms.aggregated``: the default, or, where that is not
            ``aggregation_is_a_setting``, part of the definition.
        aggregation_is_a_setting: False where the loss means nothing under another aggregation.
    """
    aggregation = {"loss_aggregation": loss_aggregation, "completion_length": None}

    def register(token_loss: Callable[..., TokenLoss]) -> Callable[..., Loss]:
        own, shared = _keywords(token_loss), _keywords(policy_terms.regularised)
        defaults = own | shared | (aggregation if aggregation_is_a_setting else {})
        name = token_loss.__name__.replace("_", "-")

        @functools.wraps(token_loss)
        def whole(logp_BT: jax.Array, batch: Rollouts, entropy_BT: jax.Array | None = None, **given: Any) -> Loss:
            if unknown := sorted(given.keys() - defaults.keys()):
                raise TypeError(f"{name} has no setting {', '.join(unknown)}")
            chosen = aggregation | defaults | given
            with jax.named_scope(name):
                logp_BT, batch, entropy_BT = policy_terms.cleaned(logp_BT, batch, entropy_BT)
                part = token_loss(logp_BT, batch, **{key: chosen[key] for key in own})
                part = policy_terms.regularised(
                    part, logp_BT, batch, entropy_BT, **{key: chosen[key] for key in shared}
                )
                return _summed(part, batch.mask_BT, **{key: chosen[key] for key in aggregation})

        whole.__signature__ = _signature(defaults)  # type: ignore[attr-defined]
        ALGORITHMS[name], HABITS[name] = whole, habits
        return whole

    return register


def _summed(part: TokenLoss, mask_BT: jax.Array, loss_aggregation: str, completion_length: int | None) -> Loss:
    total, weight = policy_terms.aggregated(part.loss_BT, mask_BT, loss_aggregation, completion_length)
    tokens = masked.count(mask_BT)
    means = {name: (masked.masked_sum(value_BT, mask_BT), tokens) for name, value_BT in part.means.items()}
    return Loss(sum=total, weight=weight, metrics=means)


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _signature(defaults: dict[str, Any]) -> inspect.Signature:
    """Return what ``help`` and ``settings`` read of an algorithm."""
    places, keywords = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter("logp_BT", places),
            inspect.Parameter("batch", places),
            inspect.Parameter("entropy_BT", places, default=None),
            *(inspect.Parameter(name, keywords, default=default) for name, default in defaults.items()),
        ],
        return_annotation=Loss,
    )


@algorithm(Habits(advantages="group-std"), loss_aggregation="sequence")
def grpo(
    logp_BT: jax.Array,
    batch: Rollouts,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Group relative policy optimisation (2402.03300, eq. 3): ``-min(r A, clip(r) A)``, a mean over each sequence."""
    ratio_BT = policy_terms.token_ratio(logp_BT, batch.old_logp_BT)
    return policy_terms.clipped_surrogate(ratio_BT, batch.advantages_B, epsilon_low, epsilon_high, dual_clip)


@algorithm(Habits(advantages="group-mean"), loss_aggregation="constant")
def dr_grpo(
    logp_BT: jax.Array,
    batch: Rollouts,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """GRPO done right (2503.20783): GRPO's token loss, not divided by lengths nor standard deviations."""
    ratio_BT = policy_terms.token_ratio(logp_BT, batch.old_logp_BT)
    return policy_terms.clipped_surrogate(ratio_BT, batch.advantages_B, epsilon_low, epsilon_high, dual_clip)


@algorithm(
    Habits(advantages="group-std", zero_variance_groups="resample", truncated_completions="penalize"),
    loss_aggregation="token",
)
def dapo(
    logp_BT: jax.Array,
    batch: Rollouts,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Decoupled clip and dynamic sampling (2503.14476, eq. 8): GRPO's token loss, clipped higher, a token mean."""
    ratio_BT = policy_terms.token_ratio(logp_BT, batch.old_logp_BT)
    return policy_terms.clipped_surrogate(ratio_BT, batch.advantages_B, epsilon_low, epsilon_high, dual_clip)


@algorithm(Habits(advantages="group-std"), loss_aggregation="sequence", aggregation_is_a_setting=False)
def gspo(
    logp_BT: jax.Array,
    batch: Rollouts,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Group sequence policy optimisation (2507.18071, eq. 5): ``-min(s A, clip(s) A)`` with the sequence's ratio s.

    All tokens of a sequence have its loss, of which the mean over tokens is again the sequence's.
    """
    ratio_BT = policy_terms.sequence_ratio(logp_BT, batch.old_logp_BT, batch.mask_BT)
    return policy_terms.clipped_surrogate(ratio_BT, batch.advantages_B, epsilon_low, epsilon_high, dual_clip)


@algorithm(Habits(advantages="group-std"), loss_aggregation="sequence", aggregation_is_a_setting=False)
def gspo_token(
    logp_BT: jax.Array,
    batch: Rollouts,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    dual_clip: float | None = None,
) -> TokenLoss:
    """GSPO with a token's own ratio ``sg(s) pi / sg(pi)`` (2507.18071, eq. 13 and 14).

    Value and gradient are GSPO's while all tokens of a sequence share their advantage.
    """
    ratio_BT = policy_terms.sequence_ratio(logp_BT, batch.old_logp_BT, batch.mask_BT)
    one_BT = policy_terms.token_ratio(logp_BT, jax.lax.stop_gradient(logp_BT))
    ratio_BT = jax.lax.stop_gradient(ratio_BT) * one_BT
    return policy_terms.clipped_surrogate(ratio_BT, batch.advantages_B, epsilon_low, epsilon_high, dual_clip)


@algorithm(
    Habits(advantages="group-std", zero_variance_groups="resample", truncated_completions="penalize"),
    loss_aggregation="token",
)
def cispo(logp_BT: jax.Array, batch: Rollouts, *, epsilon_low: float = 1.0, epsilon_high: float = 4.0) -> TokenLoss:
    """Clipped importance-sampling weights (2506.13585, eq. 4 and 5): ``-sg(clip(r)) A log pi``, a mean over tokens.

    The weight is clipped, never the token: all of them are learnt from. By default there is no lower bound, as in the
    paper, and the upper one is 5, the one of ScaleRL (2510.13786).
    """
    ratio_BT = policy_terms.token_ratio(logp_BT, batch.old_logp_BT)
    low_BT, high_BT = ratio_BT < 1 - epsilon_low, ratio_BT > 1 + epsilon_high
    weight_BT = jnp.clip(ratio_BT, 1 - epsilon_low, 1 + epsilon_high)
    return TokenLoss(
        policy_terms.weighted_likelihood(weight_BT, batch.advantages_B, logp_BT),
        {"ratio/mean": ratio_BT} | policy_terms.clip_shares(low_BT, high_BT),
    )


@algorithm(Habits(advantages="leave-one-out"), loss_aggregation="sequence-sum")
def rloo(logp_BT: jax.Array, batch: Rollouts) -> TokenLoss:
    """REINFORCE against the others of the group (2402.14740): ``-sg(r) A log pi``, the sum over each sequence.

    On-policy r is 1, and this is the paper's. The paper's KL penalty is part of the reward, ``beta`` one of the loss.
    """
    return _reinforce(logp_BT, batch)


@algorithm(Habits(advantages="batch-mean"), loss_aggregation="sequence-sum")
def reinforce(logp_BT: jax.Array, batch: Rollouts) -> TokenLoss:
    """REINFORCE (Williams, 1992) against the batch's mean: ``-sg(r) A log pi``, the sum over each sequence."""
    return _reinforce(logp_BT, batch)


def _reinforce(logp_BT: jax.Array, batch: Rollouts) -> TokenLoss:
    ratio_BT = policy_terms.token_ratio(logp_BT, batch.old_logp_BT)
    loss_BT = policy_terms.weighted_likelihood(ratio_BT, batch.advantages_B, logp_BT)
    return TokenLoss(loss_BT, {"ratio/mean": ratio_BT})

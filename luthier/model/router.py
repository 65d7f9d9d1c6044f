"""Which experts a token is sent to, with what weight, and the losses that keep a router in shape.

All of it is computed in fp32. Left out on purpose: capacities, since no token is dropped, and noise in the choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from luthier.errors import UserError
from luthier.model.segments import Prefixed, Segments


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How ``top_k`` of ``experts`` are chosen for a token, and weighed.

    ``scoring``: "softmax" over all experts, "sigmoid" of each (DeepSeek-V3), or "softmax_of_chosen" (gpt-oss), where
    the weights are a softmax over the chosen ones' logits. ``normalised`` weights are divided by their sum; ``scaling``
    multiplies them. ``router_bias`` is added to the logits. ``correction`` is a bias of each expert that counts for
    being chosen alone, and is not trained (arXiv 2408.15664).

    Of ``groups`` of experts, only those in the best ``top_groups`` can be chosen. A group is as good as its best expert
    (DeepSeek-V2, arXiv 2405.04434, section 2.2.2), or with a correction as its best two together (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).
    """

    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    normalised: bool = False
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1
    router_bias: bool = False
    correction: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where so many experts cannot be chosen."""
        if self.experts % self.groups:
            raise UserError(
                f"config.json: {self.experts} experts do not divide into n_group={self.groups} groups. "
                "Take the model's original config.json."
            )
        top_groups = min(self.top_groups, self.groups)
        reachable = self.experts // self.groups * top_groups
        if not 0 < self.top_k <= reachable:
            raise UserError(
                f"config.json: num_experts_per_tok={self.top_k} is not between 1 and the {reachable} experts of "
                f"topk_group={top_groups} out of n_group={self.groups} groups. Take the model's original config.json."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed:
    """Where tokens were sent: ``chosen_BTk`` int32, and sums over ``tokens`` that are not padding, all fp32.

    ``counts_E``: how many were sent to each expert. ``probabilities_E``: the sum of the router's probabilities.
    ``squared_lse``: the sum of the squared log-sum-exp of its logits. Stacked layers are leading axes. The sums of
    micro-batches add up.
    """

    chosen_BTk: jax.Array
    counts_E: jax.Array
    probabilities_E: jax.Array
    squared_lse: jax.Array
    tokens: jax.Array


def router_logits(x_BTD: jax.Array, w_ED: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    """Return fp32 logits ``[B, T, E]`` from fp32 weights, whatever the types of the activations and the computation."""
    x, w = x_BTD.astype(jnp.float32), w_ED.astype(jnp.float32)
    logits_BTE = jnp.einsum("BTD,ED->BTE", x, w, precision=jax.lax.Precision.HIGHEST)
    if bias_E is not None:
        logits_BTE = logits_BTE + bias_E.astype(jnp.float32)
    # Saved by the "dots" policy of `layers.remat`: the backward pass then chooses as the forward pass did.
    return checkpoint_name(logits_BTE, "dense")


def route(
    routing: Routing, logits_BTE: jax.Array, correction_E: jax.Array | None = None, routes_BTk: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return (weights fp32, chosen experts int32), each ``[B, T, k]``.

    ``routes_BTk`` gives the experts, as the sampler chose them (arXiv 2510.11370); the weights are still this
    router's, with their gradient. Where it is negative the choice is made here.
    """
    scores_BTE = jax.nn.sigmoid(logits_BTE) if routing.scoring == "sigmoid" else logits_BTE
    if routing.scoring == "softmax":
        scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    chosen_BTk = _best(routing, scores_BTE, correction_E)
    if routes_BTk is not None:
        chosen_BTk = jnp.where(routes_BTk >= 0, routes_BTk.astype(jnp.int32), chosen_BTk)
    weights_BTk = jnp.take_along_axis(scores_BTE, chosen_BTk, axis=-1)
    if routing.scoring == "softmax_of_chosen":
        weights_BTk = jax.nn.softmax(weights_BTk, axis=-1)
    if routing.normalised:
        weights_BTk = weights_BTk / (jnp.sum(weights_BTk, axis=-1, keepdims=True) + 1e-20)
    return weights_BTk * routing.scaling, chosen_BTk


def _best(routing: Routing, scores_BTE: jax.Array, correction_E: jax.Array | None) -> jax.Array:
    """Return the experts that the scores choose, ``[B, T, k]`` int32."""
    scores_BTE = jax.lax.stop_gradient(scores_BTE)
    if correction_E is not None:
        scores_BTE = scores_BTE + jax.lax.stop_gradient(correction_E).astype(jnp.float32)
    if routing.top_groups < routing.groups:
        by_group = scores_BTE.reshape(*scores_BTE.shape[:-1], routing.groups, -1)
        best_BTGn, _ = jax.lax.top_k(by_group, 1 if correction_E is None else min(2, by_group.shape[-1]))
        _, groups_BTg = jax.lax.top_k(jnp.sum(best_BTGn, axis=-1), routing.top_groups)
        open_BTG = jnp.any(groups_BTg[..., None] == jnp.arange(routing.groups), axis=-2)
        scores_BTE = jnp.where(open_BTG[..., None], by_group, -jnp.inf).reshape(scores_BTE.shape)
    return jax.lax.top_k(scores_BTE, routing.top_k)[1].astype(jnp.int32)


def real_tokens(segments: Segments) -> jax.Array | None:
    """Return which tokens are not padding, ``[B, T]``; None where there is no padding."""
    if segments is None:
        return None
    return (segments.own_BT if isinstance(segments, Prefixed) else segments) > 0


def routed(routing: Routing, logits_BTE: jax.Array, chosen_BTk: jax.Array, real_BT: jax.Array | None) -> Routed:
    """Return what losses and metrics need of one layer.

    A sigmoid router's probabilities are its scores over their sum (arXiv 2412.19437, eq. 19).
    """
    mask_BT = jnp.ones(chosen_BTk.shape[:2]) if real_BT is None else real_BT.astype(jnp.float32)
    if routing.scoring == "sigmoid":
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probabilities_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    else:
        probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    hits_BTE = jnp.sum(chosen_BTk[..., None] == jnp.arange(routing.experts), axis=-2)
    return Routed(
        chosen_BTk=chosen_BTk,
        counts_E=jnp.sum(hits_BTE * mask_BT[..., None], axis=(0, 1)),
        probabilities_E=jnp.sum(probabilities_BTE * mask_BT[..., None], axis=(0, 1)),
        squared_lse=jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * mask_BT),
        tokens=jnp.sum(mask_BT),
    )


def load_balance(routed: Routed) -> tuple[jax.Array, jax.Array]:
    """Return the load-balancing loss as (sum, weight in tokens), averaged over layers: E sum_i f_i P_i, least at k.

    f_i is how many of a token's k choices fall on expert i and P_i the mean probability of i (Switch Transformer, Fedus
    et al., arXiv 2101.03961, eq. 4; for k > 1 as in Mixtral's release).
    """
    experts = routed.counts_E.shape[-1]
    tokens = jnp.maximum(routed.tokens, 1.0)
    product = jnp.sum(routed.counts_E * routed.probabilities_E, axis=-1)
    return jnp.mean(experts * product / tokens), jnp.mean(routed.tokens)


def router_z(routed: Routed) -> tuple[jax.Array, jax.Array]:
    """Return the router's z-loss as (sum, weight in tokens), averaged over layers.

    That is the squared log-sum-exp of a token's logits (ST-MoE, Zoph et al., arXiv 2202.08906, eq. 5).
    """
    return jnp.mean(routed.squared_lse), jnp.mean(routed.tokens)

"""Log-probabilities of tokens under a vocabulary whose logits are never whole.

Logits are fp32 and held for a chunk of tokens at a time, laid out vocabulary by tokens: then the head is the left
operand of each matmul, which is transposed once a step, instead of every chunk's logits. Chunks are cut along time and
keep all rows, so that an array split over devices by rows stays split.

Two gradients. In general the backward pass computes each chunk's logits again: four matmuls. Where the loss is linear
in the log-probabilities (cross entropy is), the factor of each is known beforehand: given it, the forward pass forms
the gradients while it holds the logits, three matmuls in all.

Left out on purpose: z-loss, label smoothing and soft-capped logits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.model.cpu import fence, transposed

LOGITS_LIMIT = {"cpu": 100 * 2**20, "gpu": 2**30, "tpu": 2**30}  # bytes of fp32 logits in a chunk


class TokenScores(NamedTuple):
    """``logp_BT`` fp32, the log-probability of each target; ``correct_BT`` bool, true where it is the likeliest token."""

    logp_BT: jax.Array
    correct_BT: jax.Array


def token_logp(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, cotangent_BT: jax.Array | None = None
) -> TokenScores:
    """Return the scores of ``targets_BT`` under ``softmax(hidden @ head.T)``.

    ``hidden_BTD[b, t]`` predicts ``targets_BT[b, t]``: the caller shifts. The head is cast to the type of
    ``hidden_BTD`` for its matmuls; its gradient has its own type and is summed in fp32.

    ``cotangent_BT`` announces the derivative of the loss by ``logp_BT``, up to one factor for all tokens, and makes
    the gradient a quarter cheaper. A loss whose derivative is not as announced gets NaN gradients.
    """
    with jax.named_scope("token_logp"):
        if cotangent_BT is None:
            return TokenScores(*_scores(hidden_BTD, head_VD, targets_BT))
        return TokenScores(*_linear_scores(hidden_BTD, head_VD, targets_BT, jax.lax.stop_gradient(cotangent_BT)))

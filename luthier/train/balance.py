"""What is asked of a mixture's routers besides the loss: to spread tokens evenly, and to keep logits small.

Both are means over the tokens of a micro-batch, and count as much as its share of the step's loss does; a load is that
of a micro-batch, not of the step, as in the papers (``model.router``).

Left out on purpose: balance without a loss, by moving a correction bias (arXiv 2408.15664).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp

from luthier.algorithms import masked
from luthier.config import TrainKeys
from luthier.errors import UserError
from luthier.model import router
from luthier.model.model import Model
from luthier.model.router import Routed
from luthier.types import Loss


class Balance(NamedTuple):
    """The weights of the load-balancing loss and of the router's z-loss."""

    load_balance: float = 0.0
    router_z: float = 0.0

    @classmethod
    def of(cls, keys: TrainKeys) -> Balance:
        """Return the weights that a run's keys give."""
        return cls(keys.load_balance_loss_weight, keys.router_z_loss_weight)


NONE = Balance()


def check(keys: TrainKeys, model: Model) -> None:
    """Raise UserError where a weight is given, and the model has no router that it could be for."""
    given = [name for name in ("load_balance_loss_weight", "router_z_loss_weight") if getattr(keys, name)]
    if given and model.routes is None:
        which = ", ".join(f"{name}={getattr(keys, name):g}" for name in given)
        rest = "it" if len(given) == 1 else "them"
        raise UserError(f"{which}: this model has no experts that tokens are sent to. Leave {rest} out.")


def balanced(loss: Loss, routed: Routed | None, balance: Balance) -> Loss:
    """Return the loss with what ``balance`` asks of the routers, and the routers' metrics; as it is without any.

    ``expert_load/max`` is the load of a layer's busiest expert over that of an even spread.
    """
    if routed is None:
        return loss
    parts = {"load_balance_loss": router.load_balance(routed), "router_z_loss": router.router_z(routed)}
    total = loss.sum
    for weight, part in zip(balance, parts.values(), strict=True):
        if weight:
            total = total + weight * masked.ratio(*part) * loss.weight
    sent_L = jnp.maximum(jnp.sum(routed.counts_E, axis=-1), 1.0)
    busiest = jnp.max(routed.counts_E.max(axis=-1) * routed.counts_E.shape[-1] / sent_L)
    return replace(
        loss,
        sum=total,
        metrics=loss.metrics | parts,
        maxima=loss.maxima | {"expert_load/max": busiest},
    )

"""Several adapters over one base, for sequences of all of them in one batch.

A weight that some of them adapt gets one ``Lora`` of all their ranks: their ``a`` below one another, their ``b`` side
by side. Which of those ranks a row of the batch takes, and by how much, is a vector for each row, which is 0 for the
ranks of other adapters. So adapters may differ in rank, scale and targets, the base is a row of zeros, and one program
serves any mixture.

Left out on purpose: adapters that come and go while the engine runs, and kernels that read a row's own ranks alone
(arXiv 2310.18547): all ranks together are few beside a layer's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from luthier.errors import UserError
from luthier.model import lora, param
from luthier.model.lora import Adapter, Lora
from luthier.model.param import Param, Tree
from luthier.types import Array


def together(spec: Tree, base: Tree, several: Mapping[str, tuple[Adapter, Tree]]) -> Tree:
    """Return the weights ``base`` with ``several`` adapters by name, from which ``gated`` takes each row's own.

    Their numbers are 1 for the first and so on. Raises as ``check``.
    """
    check(spec, {name: adapter for name, (adapter, _) in several.items()})
    attached = [lora.attach(spec, base, adapter, tree) for adapter, tree in several.values()]
    return param.map_spec(_joined, spec, base, *attached)


def check(spec: Tree, several: Mapping[str, Adapter]) -> None:
    """Raise UserError for an adapter that can only be used alone."""
    for name, adapter in several.items():
        of_experts = any(unit.experts for unit in lora.units(spec, adapter))
        kinds = {"DoRA": adapter.dora, "an adapter of experts": of_experts}
        for kind in (kind for kind, found in kinds.items() if found):
            raise UserError(
                f"adapter {name}: {kind}, which cannot share a batch with the base and other adapters. Serve it alone "
                "(lora_path), or merge it into its base (`luthier convert`) and serve that."
            )


def gated(params: Tree, adapters_B: Array) -> Tree:
    """Return ``params`` as the rows of a batch are computed with them: row b by adapter ``adapters_B[b]``, 0 for none.

    Weights that did not come from ``together`` are left as they are.
    """

    def chosen(weight: Any) -> Any:
        if not isinstance(weight, Lora) or weight.gate_BR is None:
            return weight
        return replace(weight, gate_BR=jnp.take(weight.gate_BR, adapters_B, axis=-2))

    return jax.tree.map(chosen, params, is_leaf=lambda weight: isinstance(weight, Lora))


def _joined(declared: Param, weight: Any, *adapted: Any) -> Any:
    """Return a weight of the base with all that adapts it; ``gate_BR`` has a row for each adapter and one for none."""
    own = {number: each for number, each in enumerate(adapted, start=1) if isinstance(each, Lora)}
    if not own:
        return weight
    ranks = [each.a.shape[-2] for each in own.values()]
    gate_BR = np.zeros((len(adapted) + 1, sum(ranks)), np.float32)
    for (number, each), rank, end in zip(own.items(), ranks, np.cumsum(ranks), strict=True):
        gate_BR[number, end - rank : end] = each.scale
    a = jnp.concatenate([each.a for each in own.values()], axis=-2)
    b = jnp.concatenate([each.b for each in own.values()], axis=-1)
    return Lora(weight, a, b, gate_BR=jnp.broadcast_to(gate_BR, (*a.shape[:-2], *gate_BR.shape)))

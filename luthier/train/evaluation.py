"""Loss and token accuracy over held-out rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import jax

from luthier.model.param import Tree
from luthier.types import Batch, Loss


def evaluate(
    program: Callable[..., Loss], params: Tree, batches: Iterable[Batch], limit: int = -1, base: Tree = None
) -> dict[str, float]:
    """Return mean loss and accuracy per trained token over ``batches`` (the first ``limit`` of them, if not -1)."""
    chosen = itertools.islice(batches, None if limit == -1 else limit)
    totals = [program(params, batch, base) for batch in chosen]
    summed = jax.device_get(jax.tree.map(lambda *values: sum(float(value) for value in values), *totals))
    return {"loss": summed.sum / summed.weight} | {
        name: total / weight for name, (total, weight) in summed.metrics.items()
    }

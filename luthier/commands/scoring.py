"""Log-probs of given token sequences, in few shapes, so that many requests of any lengths compile little.

Left out on purpose: caching what sequences begin with in common, and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from luthier import mesh as mesh_lib
from luthier.model.param import Tree
from luthier.rollout.opened import Opened
from luthier.train import step
from luthier.types import Batch

SHORTEST = 32
"""The least width of a batch."""


class Scorer:
    """Scores sequences of up to ``longest`` tokens, ``rows`` at a time on each device. Call it in the model's mesh.

    Batches are as wide as a power of two from 32, or one and a half times one: there are few, and little is padding.
    """

    def __init__(self, opened: Opened, rows: int, longest: int) -> None:
        self._opened = opened
        self._rows = rows * mesh_lib.batch_shards(opened.mesh)
        self._widths = widths(longest)
        self._program = jax.jit(self._score)

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (index, ``logp_T``, ``greedy_T``) of each sequence, the longest first.

        ``logp_T`` is fp32, of each token given those before it, and 0 for the first; ``greedy_T`` says whether the
        token was the likeliest one.
        """
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            width = next(width for width in self._widths if width >= len(sequences[chosen[0]]))
            batch = step.place(_lay_out([sequences[i] for i in chosen], self._rows, width), self._opened.mesh)
            logp_BT, greedy_BT = jax.device_get(self._program(self._opened.params, batch))
            for row, index in enumerate(chosen):
                length = len(sequences[index])
                yield index, logp_BT[row, :length], greedy_BT[row, :length]

    def _score(self, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        compute = self._opened.compute
        with compute.precision():
            scores = self._opened.model.score(params, batch, compute)
        return scores.logp_BT.astype(jnp.float32), scores.correct_BT.astype(bool)


def widths(longest: int) -> list[int]:
    """Return the widths of batches: powers of two from 32, one and a half times each, and ``longest`` rounded up."""
    found, power = [], SHORTEST
    while power < longest:
        found += [power, power * 3 // 2]
        power *= 2
    last = -(-longest // SHORTEST) * SHORTEST
    return sorted({width for width in found if width < last} | {last})


def _lay_out(sequences: Sequence[Sequence[int]], rows: int, width: int) -> Batch:
    """Return a batch with one sequence a row, padded on the right."""
    tokens_BT = np.zeros((rows, width), np.int32)
    segments_BT = np.zeros((rows, width), np.int32)
    for row, ids in enumerate(sequences):
        tokens_BT[row, : len(ids)] = ids
        segments_BT[row, : len(ids)] = 1
    positions_BT = np.where(segments_BT > 0, np.arange(width, dtype=np.int32), 0).astype(np.int32)
    mask_BT = (segments_BT > 0) & (positions_BT > 0)
    return Batch(tokens_BT, positions_BT, segments_BT, mask_BT)

"""The prompts of a run, in the order in which they are sampled.

A position counts prompts from the start of the run, over all epochs. What stands there, and the seed of its samples,
follow from the run's seed and the position alone: so a position is all that a resumed run must know.

Left out on purpose: curricula, and choosing prompts by what the model got for them before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.data.rows import digest
from luthier.rollout.episodes import Task
from luthier.rollout.prompts import Prompt


@dataclass(frozen=True)
class Tasks:
    """The prompts of a split with their tokens, shuffled anew each epoch where ``shuffle`` says so."""

    prompts: Sequence[Prompt]
    ids: Sequence[Sequence[int]]
    seed: int
    shuffle: bool

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, position: int) -> Task:
        """Return what is asked at a position."""
        epoch, place = divmod(position, len(self))
        index = int(_order(len(self), self.seed if self.shuffle else None, epoch)[place])
        words = np.random.SeedSequence([self.seed, position]).generate_state(1)
        return Task(self.prompts[index], self.ids[index], seed=int(words[0] >> 1))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the prompts and their order, by which a resumed run knows that it goes on with the same."""
        tokens = (",".join(map(str, ids)) for ids in self.ids)
        answers = (str(prompt.reference) for prompt in self.prompts)
        return digest(*tokens, *answers, f"seed {self.seed}", f"shuffled {self.shuffle}")

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the rows that the prompts come from."""
        return list(self.prompts[0].row)

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt."""
        return max(map(len, self.ids))

    @property
    def shortest(self) -> int:
        """The tokens of the shortest prompt."""
        return min(map(len, self.ids))


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int | None, epoch: int) -> np.ndarray:
    return np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)

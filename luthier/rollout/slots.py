"""The host's record of the cache: which sequence has which row, and which tokens each row holds.

A row keeps what was read into it after its sequence has ended. A prompt that begins with those tokens starts from a
copy: so the samples of a prompt share its reading, and the next turn of a conversation goes on where the last ended,
unless another sequence took the row in between: the first free row is taken, since low rows make small programs. What
another adapter has read is never begun from: its keys and values are others.

Layers with a window lose the prompt as the completion grows. Where samples of it still wait, a row beside the others,
the keeper, has a copy for them.

Left out on purpose: the cache itself, which the programs hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

WORTH_COPYING = 16  # tokens; fewer are read anew sooner than a row is copied

S = TypeVar("S")


class Placement(NamedTuple):
    """A prompt gets ``row``, of which the first ``kept`` tokens come from row ``source`` (perhaps itself)."""

    row: int
    source: int
    kept: int


@dataclass
class Slots(Generic[S]):
    """``sequences[r]`` is what row r works on, None where it is free.

    ``tokens_RS`` are the tokens that rows hold, ``held_R`` how many (-1: not to be gone by) and ``adapter_R`` the
    number of the adapter that read them; ``ring`` is the slots of the shortest line of the cache. A row after those of
    ``sequences`` never gets one: it is the keeper.
    """

    sequences: list[S | None]
    tokens_RS: np.ndarray
    held_R: np.ndarray
    adapter_R: np.ndarray
    ring: int

    @classmethod
    def empty(cls, rows: int, length: int, ring: int, keepers: int = 0) -> Slots[S]:
        """Return the record of an empty cache of ``rows`` sequences of ``length`` tokens, and ``keepers`` beside."""
        held_R, adapter_R = np.zeros((2, rows + keepers), np.int64)
        return cls([None] * rows, np.zeros((rows + keepers, length), np.int32), held_R, adapter_R, ring)

    @property
    def free(self) -> list[int]:
        """The rows without a sequence."""
        return [row for row, sequence in enumerate(self.sequences) if sequence is None]

    @property
    def busy(self) -> list[int]:
        """The rows with one."""
        return [row for row, sequence in enumerate(self.sequences) if sequence is not None]

    def __iter__(self) -> Iterator[tuple[int, S]]:
        """Yield (row, sequence) of the rows that have one."""
        return ((row, sequence) for row, sequence in enumerate(self.sequences) if sequence is not None)

    def place(self, sequence: S, tokens_T: np.ndarray, adapter: int = 0, unread: Collection[int] = ()) -> Placement:
        """Give ``sequence`` a free row that is to hold ``tokens_T``, and say what of them is there already.

        ``unread`` are rows that are still to be read, which are waited for where that saves ``WORTH_COPYING`` tokens.
        """
        source, kept = self._longest_prefix(tokens_T, adapter, unread)
        free = self.free
        row = source if kept and source in free else free[0]
        if row != source and kept < min(WORTH_COPYING, len(tokens_T)):
            kept = 0
        self.sequences[row] = sequence
        self.tokens_RS[row, : len(tokens_T)] = tokens_T
        self.held_R[row], self.adapter_R[row] = len(tokens_T), adapter
        return Placement(row, source if kept else row, kept)

    def keep(self, tokens_T: np.ndarray, longest: int, adapter: int = 0) -> tuple[int, int] | None:
        """Give these tokens to the keeper, where a row holds all of them; return that row and the keeper's.

        None where no row does, there is no keeper or it has them already, or it would save nothing: the tokens are few,
        or a ring holds as many as there will be in a row that begins with them, ``longest``.
        """
        keeper = len(self.sequences)
        if keeper == len(self.held_R) or longest <= self.ring or len(tokens_T) < WORTH_COPYING:
            return None
        source, kept = self._longest_prefix(tokens_T, adapter, ())
        if kept < len(tokens_T) or self._common(tokens_T, adapter)[keeper] == len(tokens_T):
            return None
        self.tokens_RS[keeper, :kept] = tokens_T
        self.held_R[keeper], self.adapter_R[keeper] = kept, adapter
        return source, keeper

    def append(self, row: int, tokens_T: np.ndarray) -> None:
        """Note that these tokens were read after those that the row holds."""
        held = self.held_R[row]
        if held >= 0:
            self.tokens_RS[row, held : held + len(tokens_T)] = tokens_T
            self.held_R[row] = held + len(tokens_T)

    def move(self, source: int, target: int) -> None:
        """Note that a sequence, and what its row holds, was copied to a free row."""
        self.sequences[target], self.sequences[source] = self.sequences[source], None
        for record in (self.tokens_RS, self.held_R, self.adapter_R):
            record[target] = record[source]

    def forget(self) -> None:
        """Note that no row holds what these weights would have put there; sequences that are under way go on."""
        self.held_R[:] = 0
        self.held_R[self.busy] = -1

    def _longest_prefix(self, tokens_T: np.ndarray, adapter: int, unread: Collection[int]) -> tuple[int, int]:
        """Return the row that begins with most of the tokens (free rows and then the first preferred), and how many.

        One that is ``unread`` has to have ``WORTH_COPYING`` more, or all of them.
        """
        common_R = self._common(tokens_T, adapter)
        taken_R = np.ones(len(common_R), bool)
        taken_R[self.free] = False
        worth_R = common_R.copy()
        worth_R[[row for row in unread if common_R[row] < len(tokens_T)]] -= WORTH_COPYING
        best = int(np.lexsort((taken_R, -worth_R))[0])
        return best, int(common_R[best])

    def _common(self, tokens_T: np.ndarray, adapter: int) -> np.ndarray:
        """Return how many of the tokens each row begins with, of what can be gone on from."""
        same_RT = self.tokens_RS[:, : len(tokens_T)] == tokens_T
        same_RT &= np.arange(len(tokens_T)) < np.where(self.adapter_R == adapter, self.held_R, 0)[:, None]
        common_R = (
            np.where(same_RT.all(axis=1), len(tokens_T), same_RT.argmin(axis=1)) if len(tokens_T) else self.held_R * 0
        )
        # A ring has lost what stood before its last tokens: of such a row all can be gone on from, or nothing.
        return np.where((self.held_R <= self.ring) | (common_R == self.held_R), common_R, 0)

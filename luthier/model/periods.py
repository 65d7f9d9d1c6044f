"""A stack of layers cut into runs of a repeating period, so that a program's size does not grow with their number.

Left out on purpose: periods that begin anew in the middle of a model; what does not repeat is a run of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

Kind = TypeVar("Kind")
LONGEST = 12  # layers of a period


class Run(NamedTuple, Generic[Kind]):
    """``repeats`` times the layers of ``period``, from layer ``first`` on."""

    first: int
    period: tuple[Kind, ...]
    repeats: int

    @property
    def end(self) -> int:
        """The first layer after the run."""
        return self.first + len(self.period) * self.repeats

    @property
    def names(self) -> list[str]:
        """The names of the period's places: the number of the first layer at each."""
        return [str(self.first + place) for place in range(len(self.period))]

    def indices(self, place: int) -> range:
        """Return the layers at one place of the period."""
        return range(self.first + place, self.end, len(self.period))


def runs(layers: Sequence[Kind]) -> list[Run[Kind]]:
    """Return the runs that make up ``layers``: the shortest period that goes on to the end, else a run of equals.

    >>> [(run.period, run.repeats) for run in runs("LLGLLGLL")]
    [(('L', 'L', 'G'), 2), (('L',), 2)]
    >>> [(run.period, run.repeats) for run in runs("DDMMMM")]
    [(('D',), 2), (('M',), 4)]
    """
    found: list[Run[Kind]] = []
    first = 0
    while first < len(layers):
        rest = layers[first:]
        length = next((n for n in range(1, min(LONGEST, len(rest) - 1) + 1) if rest[n:] == rest[:-n]), None)
        if length is None:
            repeats = next((n for n, layer in enumerate(rest) if layer != rest[0]), len(rest))
            found.append(Run(first, tuple(rest[:1]), repeats))
        else:
            found.append(Run(first, tuple(rest[:length]), len(rest) // length))
        first = found[-1].end
    return found

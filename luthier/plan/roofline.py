"""How fast a program can be at best: as fast as the slowest of computing, memory and what links the devices.

The roofline model (Williams et al., Communications of the ACM 52, 2009): each of the three at its published peak, all
at the same time. A run is slower; by how much, only a run says.

Left out on purpose: how long instructions wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.plan.topologies import Topology
from luthier.plan.traffic import Collective


@dataclass(frozen=True)
class Work:
    """What one device does in one run of a program.

    ``flops`` with recomputation, ``useful`` without; ``memory`` the bytes to and from main memory; ``exchanged`` the
    bytes sent to devices of the same slice, ``network`` those sent to other slices.
    """

    flops: float
    useful: float
    memory: float
    exchanged: float
    network: float = 0.0

    def times(self, count: float) -> Work:
        """Return the work of ``count`` runs."""
        return Work(*(count * each for each in self._parts))

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[float, ...]:
        return self.flops, self.useful, self.memory, self.exchanged, self.network


@dataclass(frozen=True)
class Times:
    """Seconds that each resource is busy at its peak."""

    compute: float
    memory: float
    exchange: float
    network: float

    @property
    def bound(self) -> float:
        """The least that it takes: the slowest resource, if all that can be done at the same time is."""
        return max(self.compute, self.memory, self.exchange, self.network)

    @property
    def apart(self) -> float:
        """What it takes at these peaks if devices wait for all that they exchange."""
        return max(self.compute, self.memory) + self.exchange + self.network

    @property
    def by_name(self) -> dict[str, float]:
        """The seconds of each resource, under the name that users read."""
        return {"compute": self.compute, "memory": self.memory, "links": self.exchange, "network": self.network}

    @property
    def slowest(self) -> str:
        """The name of the slowest resource."""
        return max(self.by_name, key=self.by_name.__getitem__)


def times(work: Work, machine: Topology) -> Times:
    """Return how long each resource of a device of ``machine`` is busy."""
    chip = machine.chip
    exchange = work.exchanged / machine.exchange if work.exchanged and machine.exchange else 0.0
    return Times(work.flops / chip.flops, work.memory / chip.bandwidth, exchange, work.network / chip.network)


def sent(found: Sequence[Collective]) -> tuple[float, float]:
    """Return the bytes that a device sends within its slice, and those that it sends to others."""
    between = sum(each.total for each in found if each.slices > 1)
    return sum(each.total for each in found) - between, between

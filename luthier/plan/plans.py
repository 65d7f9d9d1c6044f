"""From a configuration to the plan of its command."""

from __future__ import annotations

from luthier.config import RlConfig, SftConfig
from luthier.plan import reinforced, supervised
from luthier.plan.report import Plan
from luthier.plan.topologies import Topology


def plan(config: SftConfig | RlConfig, machine: Topology, *, compiles: bool = True) -> Plan:
    """Return the plan of the command that ``config`` is of; by analysis alone unless it ``compiles``.

    Raises UserError where keys, mesh and model do not go together.
    """
    if isinstance(config, SftConfig):
        return supervised.plan(config, machine, compiles=compiles)
    return reinforced.plan(config, machine, compiles=compiles)

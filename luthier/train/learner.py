"""The updates of a step: completions become packed rows, rows become gradients, gradients an update.

The number of micro-batches follows from how long completions are, so the host loops over them, and every program has
one shape for the whole run.

Left out on purpose: the programs themselves (``policy_step``), and where completions come from (``feed``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from luthier import processes
from luthier.config import RlConfig
from luthier.data import groups as packing
from luthier.data.groups import Layout, Packed
from luthier.model.param import Tree
from luthier.train import step
from luthier.train.policy_step import Programs, unscored
from luthier.train.rl_plan import Objective
from luthier.train.step import TrainState
from luthier.types import Trajectory

Groups = Sequence[Sequence[Trajectory]]


@dataclass(frozen=True)
class Learner:
    """The programs of the policy step and what feeds them.

    ``reference`` is what was trained as it was at the start, where that is needed; ``base`` are the weights beside it.
    """

    config: RlConfig
    objective: Objective
    layout: Layout
    programs: Programs
    mesh: Mesh
    reference: Tree | None
    base: Tree = None

    def learn(self, state: TrainState, groups: Groups, learning_rate: float) -> tuple[TrainState, dict[str, float]]:
        """Take the updates that ``groups`` serve; return the state and the step's numbers.

        Numbers of several updates are their means, but for maxima and counts.
        """
        groups = self._with_policies(state.params, groups)
        updates = []
        for _ in range(self.config.num_iterations):
            for part in parts(groups, self.config.num_mini_batches):
                state, values = self._update(state, part, learning_rate)
                updates.append(values)
        return state, together([jax.device_get(values) for values in updates])

    def _update(
        self, state: TrainState, trajectories: Sequence[Trajectory], learning_rate: float
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        # Groups whose rewards are all alike are often half of them, and need but be counted.
        idle = [one for one in trajectories if self.objective.is_idle(one)]
        worth = [one for one in trajectories if not self.objective.is_idle(one)]
        total = self.programs.start.result()(np.float32(self.objective.weight(idle)))
        for micro in packing.pack(worth, self.layout):
            placed = step.place(step.share(micro.batch, self.mesh), self.mesh)
            total = self.programs.accumulate.result()(state.params, total, placed, self.base)
        return self.programs.apply.result()(state, total, np.float32(learning_rate))

    def _with_policies(self, params: Tree, groups: Groups) -> Groups:
        """Return the completions with the log-probs of the policies that the loss holds the current one against."""
        worth = [one for group in groups for one in group if not self.objective.is_idle(one)]
        if self.objective.old == "current":
            worth = [replace(one, old_logp_T=None) for one in worth]
        if self.objective.old == "trainer":
            scored = self._scored(params, worth)
            worth = [replace(one, old_logp_T=logp_T) for one, logp_T in zip(worth, scored, strict=True)]
        if self.reference is not None:
            # It is a policy of its own, and so are its experts.
            scored = self._scored(self.reference, [replace(one, routes_TLk=None) for one in worth])
            worth = [replace(one, reference_logp_T=logp_T) for one, logp_T in zip(worth, scored, strict=True)]
        rest = iter(worth)
        return [[one if self.objective.is_idle(one) else next(rest) for one in group] for group in groups]

    def _scored(self, params: Tree, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Return the log-probs that a policy gives the tokens of each completion."""
        program, micros = self.programs.score, packing.pack(trajectories, self.layout)
        if program is None:
            raise RuntimeError("the score program was not compiled")
        values = [processes.fetch(program.result()(params, self._unscored(micro), self.base)) for micro in micros]
        return packing.unpack(micros, values, trajectories)

    def _unscored(self, micro: Packed) -> Any:
        return step.place(step.share(unscored(micro.batch), self.mesh), self.mesh)


def parts(groups: Groups, count: int) -> list[list[Trajectory]]:
    """Return the completions of ``count`` mini-batches, groups whole and as evenly as they go; fewer if groups are."""
    count = max(1, min(count, len(groups)))
    edges = [len(groups) * number // count for number in range(count + 1)]
    return [[one for group in groups[start:stop] for one in group] for start, stop in itertools.pairwise(edges)]


def together(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of several updates as one: counts added up, maxima the greatest, all else the mean."""
    joined = {}
    for name in updates[0]:
        values = [float(update[name]) for update in updates]
        if name.startswith("num_"):
            joined[name] = sum(values)
        elif name.endswith("/max"):
            joined[name] = 0.0 if max(values) == -math.inf else max(values)  # that of nothing at all
        else:
            joined[name] = sum(values) / len(values)
    return joined

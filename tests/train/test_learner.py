"""The updates of a step: mini-batches, policies to hold against, and completions that need not be computed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.config import RlConfig
from luthier.data.groups import Layout
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.train import learner as learner_lib
from luthier.train import optimizer, policy_step, rl_plan, step
from luthier.train.learner import Learner
from luthier.train.policy_step import Policy
from luthier.train.rl_plan import Objective
from luthier.types import Trajectory
from tiny import TINY

MODEL = Model.from_hf(TINY | {"num_hidden_layers": 1}, "tiny")
LAYOUT = Layout(rows=2, row_length=48, scored=40, sequences=8, completion_length=8)


def groups(flat: int) -> list[list[Trajectory]]:
    """Return four groups of four, ``flat`` of which have no advantages; the sampler's log-probs are none of ours."""
    random = np.random.default_rng(0)
    found = []
    for number in range(4):
        prompt_T = random.integers(0, 256, 6).astype(np.int32)
        group = []
        for _ in range(4):
            length = int(random.integers(2, 9))
            logp_T = (-np.log(256) + 0.05 * random.normal(size=length)).astype(np.float32)
            tokens_T = random.integers(0, 256, length).astype(np.int32)
            advantage = 0.0 if number < flat else float(random.normal())
            group.append(Trajectory(prompt_T, tokens_T, np.ones(length, bool), logp_T, logp_T, None, advantage))
        found.append(group)
    return found


def learn(ours: list[list[Trajectory]], **keys: Any) -> tuple[Any, dict[str, float], list[int]]:
    """Take a step with SGD; return the weights' change, the numbers, and the number of micro-batches of each update."""
    fixed = {"opt_type": "sgd", "adam_b1": 0.0, "gradient_clipping_threshold": 0.0, "max_new_tokens": 8}
    config = RlConfig(model_name="x", **fixed | keys)
    mesh = mesh_lib.make(config, jax.devices()[:1])
    objective = rl_plan.objective(config, jnp.float32)
    with mesh_lib.use(mesh), ThreadPoolExecutor(1) as background:
        tx = optimizer.make(config, MODEL.spec)
        abstract = step.abstract_state(tx, MODEL.spec, jnp.float32, mesh)
        policy = Policy(MODEL, objective.loss, Compute(), entropy=objective.entropy, own_old=objective.old == "trainer")
        programs = policy_step.compile_steps(
            policy, tx, abstract, LAYOUT, mesh, background, old=objective.old != "current", reference=config.beta > 0
        )
        params = param.initialise(MODEL.spec, jax.random.key(0), jnp.float32, mesh, scale=0.1)
        before = jax.device_get(params)
        reference = jax.tree.map(jnp.array, params) if config.beta else None
        packed: list[int] = []
        pack = learner_lib.packing.pack
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner_lib.packing, "pack", lambda *args: [packed.append(len(args[0])), pack(*args)][1])
            state, numbers = Learner(config, objective, LAYOUT, programs, mesh, reference).learn(
                step.init_state(params, tx, MODEL.spec, mesh), ours, 1.0
            )
        return jax.tree.map(np.subtract, jax.device_get(state.params), before), numbers, packed


@pytest.mark.parametrize(
    "algorithm", ["grpo", "dapo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dr-grpo", "rloo"))]
)
def test_flat_groups_weigh_but_are_not_computed(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped, numbers, packed = learn(groups(flat=2), loss_algo=algorithm)
    monkeypatch.setattr(Objective, "is_idle", lambda self, one: False)
    whole, expected, all_packed = learn(groups(flat=2), loss_algo=algorithm)
    assert (packed, all_packed) == ([8], [16])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), skipped, whole)
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 1e-4


@pytest.mark.parametrize("keys", [{"beta": 0.1}, {"entropy_coefficient": 0.01}, {"log_entropy": True}], ids=str)
def test_flat_groups_are_computed_where_more_than_the_reward_acts(keys: dict[str, Any]) -> None:
    assert learn(groups(flat=2), **keys)[2][-1] == 16


def test_a_step_of_flat_groups_alone_changes_nothing() -> None:
    change, numbers, packed = learn(groups(flat=4))
    assert packed == [0]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(change))
    assert np.isfinite(list(numbers.values())).all()


def test_the_old_policy_of_one_corrected_update_is_the_current_one() -> None:
    _, numbers, _ = learn(groups(flat=0), importance_sampling_correction="token")
    assert numbers["ratio/mean"] == 1.0
    assert numbers["sampling/logp_difference/mean"] > 0.01  # against the sampler all the same


def test_several_updates_are_held_against_the_policy_before_the_first() -> None:
    _, numbers, packed = learn(
        groups(flat=0), num_iterations=2, num_mini_batches=2, epsilon_low=1e-4, epsilon_high=1e-4
    )
    assert packed == [16, 8, 8, 8, 8]  # scored once, then two passes of two parts
    assert numbers["clip_ratio/region_mean"] > 0.1  # it has moved


def test_the_divergence_from_the_reference_is_0_before_the_first_update() -> None:
    _, numbers, _ = learn(groups(flat=0), beta=0.1)
    assert numbers["kl"] == pytest.approx(0, abs=1e-7)


def test_parts_are_whole_groups() -> None:
    ours = groups(flat=0)[:3]
    ours[1] = [replace(one, advantage=7.0) for one in ours[1]]
    assert [len(part) for part in learner_lib.parts(ours, 2)] == [4, 8]
    assert [len(part) for part in learner_lib.parts(ours, 8)] == [4, 4, 4]
    assert learner_lib.parts([], 4) == [[]]


def test_numbers_of_several_updates() -> None:
    updates = [{"loss": 1.0, "num_tokens": 3, "x/max": 1.0}, {"loss": 3.0, "num_tokens": 4, "x/max": 0.5}]
    assert learner_lib.together(updates) == {"loss": 2.0, "num_tokens": 7, "x/max": 1.0}

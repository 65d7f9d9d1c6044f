"""Invariants of the policy step: what may not change its result but for rounding."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.algorithms import policy
from luthier.config import SftConfig
from luthier.data.groups import Layout, pack, unpack
from luthier.model import param
from luthier.model.compute import Compute
from luthier.train import optimizer, policy_step, step
from luthier.train.policy_step import Policy
from luthier.types import Batch, Trajectory
from tiny import WITH_EXPERTS, kind_model

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
PER_MICRO_BATCH = ("load_balance_loss", "expert_load/max")
"""Numbers of a mixture that are a micro-batch's, not the step's."""
LOSS = functools.partial(policy.ALGORITHMS["grpo"], loss_aggregation="token", beta=0.1, entropy_coefficient=0.01)
POLICY = Policy(kind_model("llama"), LOSS, Compute(), temperature=0.8, entropy=True)
SHARED = Layout(rows=2, row_length=80, scored=70, sequences=8, completion_length=12)


def trajectories() -> list[Trajectory]:
    """Return four groups of five completions, with observations in them, their log-probs near a random model's."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(4):
        prompt_T = random.integers(0, 256, random.integers(5, 20)).astype(np.int32)
        for _ in range(5):
            length = int(random.integers(2, 13))
            logps = (-np.log(256) + 0.3 * random.normal(size=(3, length))).astype(np.float32)
            tokens_T, mask_T = random.integers(0, 256, length).astype(np.int32), random.random(length) < 0.8
            found.append(Trajectory(prompt_T, tokens_T, mask_T, *logps, float(random.normal())))
    return found


def config(**keys: object) -> SftConfig:
    fixed = {"opt_type": "sgd", "adam_b1": 0.0, "gradient_clipping_threshold": 0.0}
    return SftConfig(model_name="x", hf_path="y", **fixed | keys)


class Steps:
    """The compiled programs over a mesh, and a state that they change."""

    def __init__(self, keys: SftConfig, layout: Layout, *, devices: int = 1, policy: Policy = POLICY) -> None:
        self.layout, self.mesh = layout, mesh_lib.make(keys, jax.devices()[:devices])
        spec = policy.model.spec
        tx = optimizer.make(keys, spec)
        abstract = step.abstract_state(tx, spec, jnp.float32, self.mesh)
        with ThreadPoolExecutor(1) as background:
            self.programs = policy_step.compile_steps(
                policy, tx, abstract, layout, self.mesh, background, reference=True
            )
        params = param.initialise(spec, jax.random.key(0), jnp.float32, self.mesh, scale=0.1)
        self.state = step.init_state(params, tx, spec, self.mesh)

    def take(self, ours: list[Trajectory], learning_rate: float = 1.0) -> dict[str, float]:
        """Take a step on these completions; return its metrics."""
        running = self.programs.start.result()(np.float32(0))
        for micro in pack(ours, self.layout):
            placed = step.place(micro.batch, self.mesh)
            running = self.programs.accumulate.result()(self.state.params, running, placed, None)
        self.state, metrics = self.programs.apply.result()(self.state, running, np.float32(learning_rate))
        return {name: float(value) for name, value in metrics.items()}

    def score(self, ours: list[Trajectory]) -> list[np.ndarray]:
        """Return the log-probs of each completion's trained tokens."""
        packed = pack(ours, self.layout)
        placed = [policy_step.unscored(step.place(micro.batch, self.mesh)) for micro in packed]
        score = self.programs.score.result()
        return unpack(packed, [np.asarray(score(self.state.params, micro, None)) for micro in placed], ours)


def one_step(layout: Layout, *, kind: str = "llama", devices: int = 1, policy: Policy = POLICY, **keys: int) -> tuple:
    """One SGD step at a learning rate of one: the change of the weights is the gradient."""
    steps = Steps(config(**keys), layout, devices=devices, policy=replace(policy, model=kind_model(kind)))
    before = jax.device_get(steps.state.params)
    metrics = steps.take(trajectories())
    return jax.tree.map(np.subtract, before, jax.device_get(steps.state.params)), metrics


def assert_equal_steps(one: tuple, other: tuple) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), one[0], other[0])
    # Prompts that are not shared are more tokens, and count more often for the routers.
    apart = ("num_tokens", "router_z_loss", *PER_MICRO_BATCH)
    same = other[1] | {name: one[1][name] for name in apart if name in one[1]}
    assert one[1] == pytest.approx(same, rel=5e-5, abs=1e-6)


@functools.cache
def reference(kind: str) -> tuple:
    """The step without sharing, all rows in one micro-batch."""
    return one_step(replace(SHARED, rows=20, row_length=32, scored=12, sequences=1, shared=False), kind=kind)


SLOW = pytest.mark.slow
LAYOUTS = [
    SHARED,
    replace(SHARED, rows=1, row_length=40),  # cut groups
    replace(SHARED, rows=8),  # empty rows
    replace(SHARED, rows=1, row_length=300, scored=240, sequences=20),  # several groups in a row
    replace(SHARED, rows=3, shared=False),
]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("llama", layout) for layout in LAYOUTS),
        ("gemma3-text", SHARED),
        *(pytest.param("gemma3-text", layout, marks=SLOW) for layout in LAYOUTS[1:]),
        *(pytest.param(kind, layout, marks=SLOW) for kind in WITH_EXPERTS for layout in LAYOUTS),
    ],
    ids=str,
)
def test_sharing_and_micro_batches_change_nothing(kind: str, layout: Layout) -> None:
    assert_equal_steps(one_step(layout, kind=kind), reference(kind))


AXES = ("data", "fsdp", "expert", "tensor", "context")
MESHES = [
    ("llama", (2, 2, 1, 2)),
    *(pytest.param("llama", mesh, marks=SLOW) for mesh in ((1, 8, 1, 1), (2, 1, 1, 4))),
    *(pytest.param("gemma3-text", mesh, marks=SLOW) for mesh in ((2, 2, 1, 2), (1, 2, 1, 1, 4))),
    ("qwen3-moe", (1, 2, 2, 2)),
    *(pytest.param(kind, (1, 1, 8, 1), marks=SLOW) for kind in WITH_EXPERTS),
    pytest.param("deepseek-v3", (1, 2, 2, 2), marks=SLOW),
]


@pytest.mark.parametrize(("kind", "mesh"), MESHES, ids=str)
def test_one_device_equals_eight(kind: str, mesh: tuple[int, ...]) -> None:
    axes = {f"ici_{axis}_parallelism": size for axis, size in zip(AXES, mesh, strict=False)}
    layout = replace(SHARED, rows=int(np.prod(mesh[:3])))
    assert_equal_steps(one_step(layout, kind=kind, devices=8, **axes), reference(kind))


def test_the_metrics_of_a_step() -> None:
    ours = trajectories()
    gradient, metrics = reference("llama")
    assert metrics["num_trained_tokens"] == sum(one.mask_T.sum() for one in ours)
    assert metrics["num_tokens"] == sum(len(one.prompt_T) + len(one.tokens_T) for one in ours)
    assert metrics["grad_norm"] == pytest.approx(float(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))))
    assert {"loss", "entropy", "kl", "sampling/logp_difference/mean", "sampling/kl"} <= metrics.keys()
    assert 0 < metrics["sampling/logp_difference/mean"] < metrics["sampling/logp_difference/max"]


def test_scores_are_those_of_whole_logits_and_what_mismatch_compares() -> None:
    steps, ours = Steps(config(), SHARED), trajectories()
    found = steps.score(ours)
    differences = []

    @jax.jit
    def whole(params: param.Tree, ids_T: jax.Array) -> jax.Array:
        batch = Batch(ids_T[None], jnp.arange(32)[None], jnp.ones((1, 32), jnp.int32), ids_T[None])
        logp_TV = jax.nn.log_softmax(POLICY.model.logits(params, batch, Compute())[0] / 0.8)
        return logp_TV[jnp.arange(31), ids_T[1:]]

    for one, logp_T in zip(ours, found, strict=True):
        ids_T, end = np.zeros(32, np.int32), len(one.prompt_T) + len(one.tokens_T)
        ids_T[:end] = np.concatenate([one.prompt_T, one.tokens_T])
        expected_T = np.asarray(whole(steps.state.params, ids_T))[len(one.prompt_T) - 1 : end - 1]
        np.testing.assert_allclose(logp_T, np.where(one.mask_T, expected_T, 0), atol=1e-5)
        differences.append(np.abs(logp_T - one.sampler_logp_T)[one.mask_T])
    metrics = steps.take(ours)
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(np.concatenate(differences).mean(), rel=1e-4)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(np.concatenate(differences).max(), rel=1e-4)


def test_old_log_probs_of_its_own_are_compared_with_the_sampler() -> None:
    ours = trajectories()
    same = [replace(one, old_logp_T=one.sampler_logp_T + 0.25) for one in ours]
    metrics = Steps(config(), SHARED, policy=replace(POLICY, own_old=True)).take(same)
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(0.25, rel=1e-4)


def test_a_step_that_weighs_nothing_changes_nothing() -> None:
    steps, ours = Steps(config(opt_type="adamw", adam_b1=0.9), SHARED), trajectories()
    steps.take(ours, 1e-3)
    before = jax.device_get(steps.state)
    metrics = steps.take([replace(one, mask_T=np.zeros_like(one.mask_T)) for one in ours], 1e-3)
    after = jax.device_get(steps.state)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["loss"] == metrics["grad_norm"] == metrics["num_trained_tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, (before.params, before.opt_state), (after.params, after.opt_state))
    assert after.step == before.step + 1 == 2


def test_what_is_outside_the_mask_reaches_nothing() -> None:
    """Observations have no log-probs: NaN there must not spread."""
    ours = [
        replace(one, sampler_logp_T=np.where(one.mask_T, one.sampler_logp_T, np.nan).astype(np.float32))
        for one in trajectories()
    ]
    steps = Steps(config(), SHARED)
    before = jax.device_get(steps.state.params)
    metrics = steps.take(ours)
    gradient = jax.tree.map(np.subtract, before, jax.device_get(steps.state.params))
    assert_equal_steps((gradient, metrics), reference("llama"))

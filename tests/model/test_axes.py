"""Every axis of the mesh, and every two of them, on eight simulated devices: loss and gradient are one device's."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close

from luthier import mesh as mesh_lib
from luthier.config import ModelKeys
from luthier.data.groups import Layout, pack
from luthier.model import param
from luthier.model.compute import Compute
from luthier.types import Trajectory
from tiny import KINDS, kind_model, make_batch

KEPT_SMALL = {"tensor": 4}
"""Axes that the tiny models do not divide by eight: four heads."""
STRATEGIES = ("all_gather", "ring")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SLOW, EXHAUSTIVE = pytest.mark.slow, pytest.mark.exhaustive

Axes = dict[str, int]


def alone() -> list[Axes]:
    return [{axis: KEPT_SMALL.get(axis, 8)} for axis in mesh_lib.AXES]


def pairs() -> list[Axes]:
    """Four devices along one axis and two along the other, both ways."""
    return [{first: 4, second: 2} for first, second in itertools.permutations(mesh_lib.AXES, 2)]


def name(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return "-".join(f"{axis}{size}" for axis, size in value.items())


def keys(axes: Axes) -> ModelKeys:
    return ModelKeys(ici_fsdp_parallelism=axes.get("fsdp", 1)).model_copy(
        update={f"ici_{axis}_parallelism": size for axis, size in axes.items()}
    )


def on(axes: Axes, kind: str, loss: Any, compute: Compute) -> tuple[float, dict[str, np.ndarray]]:
    """Return loss and gradient, by the names of weights, on a mesh of these axes."""
    model, count = kind_model(kind), int(np.prod(list(axes.values())))
    with mesh_lib.use(mesh_lib.make(keys(axes), jax.devices()[:count])) as mesh, compute.precision():
        params = param.initialise(model.spec, jax.random.key(0), jnp.float32, mesh, scale=0.1)
        run = jax.jit(jax.value_and_grad(functools.partial(loss, model, compute)), compiler_options=QUICK)
        value, gradient = run(params)
        return float(value), {path: np.asarray(leaf) for path, leaf in param.leaves(gradient).items()}


def supervised(rows: int, length: int) -> Any:
    """Return the loss of packed rows, its gradient announced as in training."""
    batch = make_batch(rows=rows, length=length, vocab=272)

    def loss(model: Any, compute: Compute, params: param.Tree) -> jax.Array:
        mask_BT = jnp.asarray(batch.mask_BT, jnp.float32)
        return -jnp.sum(model.score(params, batch, compute, -mask_BT).logp_BT * mask_BT)

    return loss


def policy() -> Any:
    """Return a loss of completions that share their prompts, with entropies."""
    random, some = np.random.default_rng(0), []
    for _ in range(8):
        prompt_T = random.integers(3, 272, random.integers(4, 12)).astype(np.int32)
        for _ in range(3):
            tokens_T = random.integers(3, 272, random.integers(1, 7)).astype(np.int32)
            logp_T = np.zeros(len(tokens_T), np.float32)
            some.append(Trajectory(prompt_T, tokens_T, np.ones(len(tokens_T), bool), logp_T, logp_T, None, 1.0))
    batch = pack(some, Layout(rows=8, row_length=33, scored=19, sequences=3, completion_length=7))[0].batch

    def loss(model: Any, compute: Compute, params: param.Tree) -> jax.Array:
        scores = model.score_tokens(params, batch, compute, temperature=0.8, entropy=True)
        return jnp.sum(jnp.square(scores.logp_BT) + scores.entropy_BT)

    return loss


LOSSES = {"even": supervised(8, 32), "odd": supervised(8, 37), "policy": policy()}


@functools.cache
def expected(kind: str, loss: str) -> tuple[float, dict[str, np.ndarray]]:
    return on({"data": 1}, kind, LOSSES[loss], Compute())


def assert_equals_one_device(kind: str, axes: Axes, strategy: str, loss: str = "even", remat: str = "none") -> None:
    value, gradient = on(axes, kind, LOSSES[loss], Compute(remat=remat, context=strategy))
    wanted, of_one = expected(kind, loss)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert gradient.keys() == of_one.keys()
    for path, leaf in gradient.items():
        assert_close(leaf, of_one[path], 2e-5)


FIRST = [("llama", {"context": 4, "tensor": 2}, "all_gather"), ("gemma3-text", {"context": 4, "fsdp": 2}, "ring")]
SECOND = [("qwen3-moe", {"expert": 4, "context": 2}, "all_gather"), ("deepseek-v3", {"context": 4, "fsdp": 2}, "ring")]


def cases() -> list[Any]:
    """Return each kind, axes and strategy: some quick, others and time's alone slow, the rest further ones."""
    found = []
    for kind, axes in itertools.product(KINDS, alone() + pairs()):
        for strategy in STRATEGIES if "context" in axes else STRATEGIES[:1]:
            case = (kind, axes, strategy)
            mark = SLOW if axes == {"context": 8} or case in SECOND else EXHAUSTIVE
            found.append(pytest.param(*case, marks=[] if case in FIRST else mark))
    return found


@pytest.mark.parametrize(("kind", "axes", "strategy"), cases(), ids=name)
def test_loss_and_gradient_are_one_devices(kind: str, axes: Axes, strategy: str) -> None:
    assert_equals_one_device(kind, axes, strategy)


def lengths() -> list[Any]:
    """Return each kind, loss and strategy: two quick, of each kind one slow, the rest further ones."""
    found = []
    for case in itertools.product(KINDS, ("odd", "policy"), STRATEGIES):
        mark = SLOW if case[1:] == ("policy", "ring") else EXHAUSTIVE
        quick = case in (("llama", "odd", "all_gather"), ("llama", "policy", "ring"))
        found.append(pytest.param(*case, marks=[] if quick else mark))
    return found


@pytest.mark.parametrize(("kind", "loss", "strategy"), lengths())
def test_rows_of_any_length_and_shared_prompts(kind: str, loss: str, strategy: str) -> None:
    assert_equals_one_device(kind, {"context": 4, "fsdp": 2}, strategy, loss)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=SLOW), pytest.param("full", marks=EXHAUSTIVE)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_remat_changes_nothing(strategy: str, remat: str) -> None:
    assert_equals_one_device("gemma3-text", {"context": 4, "fsdp": 2}, strategy, remat=remat)


@pytest.mark.slow
def test_three_axes_at_a_time() -> None:
    assert_equals_one_device("qwen3-moe", {"expert": 2, "context": 2, "tensor": 2}, "ring", "policy")

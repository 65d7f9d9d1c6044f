"""What is asked of a mixture's routers besides the loss."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import cli
from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.config import SftConfig
from luthier.errors import UserError
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.router import Routed
from luthier.train import optimizer, step
from luthier.train.balance import NONE, Balance, balanced, check
from luthier.types import Loss
from tiny import kind_model, make_batch

BALANCE = Balance(load_balance=0.5, router_z=0.25)
KEYS = SftConfig(
    model_name="x", hf_path="y", opt_type="sgd", adam_b1=0.0, gradient_clipping_threshold=0.0,
    load_balance_loss_weight=BALANCE.load_balance, router_z_loss_weight=BALANCE.router_z,
)  # fmt: skip


def routed() -> Routed:
    """Two layers, four experts, ten tokens that go to two each."""
    return Routed(
        chosen_BTk=jnp.zeros((2, 1, 10, 2), jnp.int32),
        counts_E=jnp.array([[5.0, 5, 5, 5], [10, 10, 0, 0]]),
        probabilities_E=jnp.array([[2.5, 2.5, 2.5, 2.5], [4, 4, 1, 1]]),
        squared_lse=jnp.array([30.0, 10]),
        tokens=jnp.array([10.0, 10]),
    )


def test_equals_what_is_worked_by_hand() -> None:
    """The first layer is even, whose loss is k; the second has 4 (10 x 4 + 10 x 4) / 100."""
    loss = Loss(sum=jnp.float32(7), weight=jnp.float32(4), metrics={"other": (jnp.float32(1), jnp.float32(2))})
    found = balanced(loss, routed(), BALANCE)
    load, z = (2 + 3.2) / 2, (3 + 1) / 2
    assert float(found.sum) == pytest.approx(7 + 4 * (0.5 * load + 0.25 * z))
    assert found.weight == loss.weight
    numbers = {name: float(value) for name, value in step.means(found).items()}
    assert numbers == {
        "loss": pytest.approx(7 / 4 + 0.5 * load + 0.25 * z),
        "other": 0.5,
        "load_balance_loss": pytest.approx(load),
        "router_z_loss": pytest.approx(z),
        "expert_load/max": 2.0,
    }


def test_nothing_is_asked_of_a_dense_model_nor_by_weights_of_zero() -> None:
    loss = Loss(sum=jnp.float32(7), weight=jnp.float32(4), metrics={})
    assert balanced(loss, None, BALANCE) is loss
    assert balanced(loss, routed(), NONE).sum is loss.sum


def test_a_micro_batch_of_padding_adds_nothing() -> None:
    empty = jax.tree.map(jnp.zeros_like, routed())
    found = balanced(Loss(sum=jnp.float32(0), weight=jnp.float32(0), metrics={}), empty, BALANCE)
    assert {float(value) for value in step.means(found).values()} == {0.0}


@pytest.mark.parametrize("keys", [("load_balance_loss_weight=0.5",), ("router_z_loss_weight=0.25",)])
def test_a_model_without_experts_is_refused(
    keys: tuple[str, ...], tmp_path: Path, tiny_model: Path, tiny_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = (f"base_output_directory={tmp_path}", f"load_parameters_path={tiny_model}", f"hf_path={tiny_rows}")
    assert cli.main(["sft", *places, "run_name=run", *keys]) == 2
    assert f"{keys[0]}: this model has no experts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_zero_fit_every_model() -> None:
    check(SftConfig(model_name="x", hf_path="y"), kind_model("llama"))
    check(KEYS, kind_model("qwen3-moe"))
    with pytest.raises(UserError, match=r"load_balance_loss_weight=0.5, router_z_loss_weight=0.25: .* Leave them out"):
        check(KEYS, kind_model("llama"))


MODEL = kind_model("qwen3-moe")
BATCH = make_batch(rows=2)


@functools.cache
def gradient(balance: Balance, *, times: int = 1) -> tuple[param.Tree, dict[str, float]]:
    """Return the gradient, by an SGD step at a learning rate of one over equal micro-batches, and its metrics."""
    one = mesh_lib.make(KEYS, jax.devices()[:1])
    batch = jax.tree.map(lambda rows: np.concatenate([rows] * times), BATCH)
    with mesh_lib.use(one):
        tx = optimizer.make(KEYS, MODEL.spec)
        params = param.initialise(MODEL.spec, jax.random.key(0), jnp.float32, one, scale=0.1)
        before = jax.device_get(params)
        run = step.make_train_step(MODEL, sft, tx, Compute(), balance)
        placed = step.place(batch, one, accumulate=times)
        state, metrics = run(step.init_state(params, tx, MODEL.spec, one), placed, jnp.float32(1.0))
    moved = jax.tree.map(np.subtract, before, jax.device_get(state.params))
    return moved, {name: float(value) for name, value in metrics.items()}


def test_it_is_added_to_the_loss_and_reaches_the_router() -> None:
    """The change of a gradient by the weights is the gradient of what they weigh."""
    (plain, before), (weighed, after) = gradient(NONE), gradient(Balance.of(KEYS))
    extra = 0.5 * after["load_balance_loss"] + 0.25 * after["router_z_loss"]
    assert after["loss"] == pytest.approx(before["loss"] + extra, rel=1e-5)

    def asked(params: param.Tree) -> jax.Array:
        scores = MODEL.score(params, BATCH, Compute())
        nothing = Loss(sum=jnp.float32(0), weight=jnp.float32(1), metrics={})
        return balanced(nothing, scores.routed, BALANCE).sum

    one = mesh_lib.make(KEYS, jax.devices()[:1])
    params = param.initialise(MODEL.spec, jax.random.key(0), jnp.float32, one, scale=0.1)
    expected = jax.device_get(jax.jit(jax.grad(asked))(params))
    assert np.abs(expected["layers"]["0"]["mlp"]["router"]).max(axis=(1, 2)).all()
    difference = jax.tree.map(np.subtract, weighed, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), difference, expected)


def test_equal_micro_batches_add_up_to_one_of_them() -> None:
    one, other = gradient(BALANCE), gradient(BALANCE, times=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), one[0], other[0])
    same = {name: value for name, value in one[1].items() if not name.startswith("num_")}
    assert {name: other[1][name] for name in same} == pytest.approx(same, rel=2e-5)

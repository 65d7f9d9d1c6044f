"""Invariants of the step: what may not change a result but for rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.config import SftConfig
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.train import optimizer, step
from luthier.types import Batch
from tiny import TINY, make_batch

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
MODEL = Model.from_hf(TINY, "tiny")


def config(**keys: object) -> SftConfig:
    return SftConfig(model_name="x", hf_path="y", opt_type="sgd", adam_b1=0.0, gradient_clipping_threshold=0.0, **keys)


def one_step(
    keys: SftConfig, batch: Batch, *, devices: int = 1, accumulate: int = 1, compute: Compute | None = None
) -> tuple[param.Tree, dict[str, float]]:
    """One SGD step at a learning rate of one: the change of the weights is the gradient."""
    mesh = mesh_lib.make(keys, jax.devices()[:devices])
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, MODEL.spec)
        params = param.initialise(MODEL.spec, jax.random.key(0), jnp.float32, mesh, scale=0.1)
        before = jax.device_get(params)
        state = step.init_state(params, tx, MODEL.spec, mesh)
        run = step.make_train_step(MODEL, sft, tx, compute or Compute())
        state, metrics = run(state, step.place(batch, mesh, accumulate=accumulate), jnp.float32(1.0))
        after = jax.device_get(state.params)
    return jax.tree.map(np.subtract, before, after), {name: float(value) for name, value in metrics.items()}


def assert_equal_steps(one: tuple, other: tuple) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), one[0], other[0])
    assert one[1] == pytest.approx(other[1], rel=2e-5)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(rows=8)


@pytest.fixture(scope="module")
def reference(batch: Batch) -> tuple:
    return one_step(config(), batch)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_batch_times_accumulation(reference: tuple, batch: Batch, accumulate: int) -> None:
    assert_equal_steps(one_step(config(), batch, accumulate=accumulate), reference)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_on_and_off(reference: tuple, batch: Batch, policy: str) -> None:
    assert_equal_steps(one_step(config(), batch, compute=Compute(remat=policy)), reference)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)], ids=str)
def test_one_device_equals_eight(reference: tuple, batch: Batch, data: int, fsdp: int, tensor: int) -> None:
    keys = config(ici_data_parallelism=data, ici_fsdp_parallelism=fsdp, ici_tensor_parallelism=tensor)
    assert_equal_steps(one_step(keys, batch, devices=8), reference)


def test_eight_devices_accumulate_too(reference: tuple, batch: Batch) -> None:
    assert_equal_steps(one_step(config(ici_tensor_parallelism=2), batch, devices=4, accumulate=2), reference)


def test_packed_equals_padded() -> None:
    packed = make_batch(rows=2)
    rows = []
    for row in range(2):
        for segment in (1, 2):
            where = np.flatnonzero(packed.segments_BT[row] == segment)
            padded = np.zeros((4, packed.tokens_BT.shape[1]), np.int32)
            ones_BT = np.ones_like(packed.tokens_BT)
            for line, array in enumerate((packed.tokens_BT, packed.positions_BT, ones_BT, packed.mask_BT)):
                padded[line, : len(where)] = array[row, where]
            rows.append(padded)
    padded = Batch(*np.stack(rows, axis=1))
    assert_equal_steps(one_step(config(), packed), one_step(config(), padded))


def test_the_gradient_is_that_of_the_mean_over_trained_tokens(reference: tuple, batch: Batch) -> None:
    """Against plain autodiff of whole logits, which shares nothing with the chunked loss."""

    def loss(params: param.Tree) -> jax.Array:
        logp_BTV = jax.nn.log_softmax(MODEL.logits(params, batch, Compute()))
        logp_BT = jnp.take_along_axis(logp_BTV[:, :-1], batch.tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return -(logp_BT * batch.mask_BT[:, 1:]).sum() / batch.mask_BT.sum()

    one_device = mesh_lib.make(config(), jax.devices()[:1])
    params = param.initialise(MODEL.spec, jax.random.key(0), jnp.float32, one_device, scale=0.1)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert reference[1]["loss"] == pytest.approx(float(value), rel=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), reference[0], jax.device_get(gradient))


def test_weights_and_moments_are_sharded(batch: Batch) -> None:
    keys = SftConfig(model_name="x", hf_path="y", ici_fsdp_parallelism=4, ici_tensor_parallelism=2)
    mesh = mesh_lib.make(keys)
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, MODEL.spec)
        params = param.initialise(MODEL.spec, jax.random.key(0), jnp.float32, mesh)
        state = step.init_state(params, tx, MODEL.spec, mesh)
        run = step.make_train_step(MODEL, sft, tx, Compute())
        for _ in range(2):
            state, _ = run(state, step.place(batch, mesh, accumulate=1), jnp.float32(0.1))
    for tree in (state.params, state.opt_state):
        gates = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "gate" in str(path[-1])]
        assert gates
        for gate in gates:
            assert gate.addressable_shards[0].data.size == gate.size // 8


def test_a_dropped_metric_would_show(reference: tuple) -> None:
    assert set(reference[1]) == {"loss", "mean_token_accuracy", "num_trained_tokens", "num_tokens", "grad_norm"}

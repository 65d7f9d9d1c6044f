"""Invariants of the step: what may not change a result but for rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.config import SftConfig
from luthier.model import param
from luthier.model.compute import Compute
from luthier.train import optimizer, step
from luthier.types import Batch
from tiny import KINDS, WITH_EXPERTS, kind_model, make_batch

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
PER_MICRO_BATCH = ("load_balance_loss", "expert_load/max")
"""Numbers of a mixture that are a micro-batch's, not the step's."""
SLOW = pytest.mark.slow
kinds = pytest.mark.parametrize("kind", KINDS)
slow_latent = pytest.mark.parametrize(  # latent attention before experts takes the longest to compile
    "kind", [pytest.param(kind, marks=SLOW if kind == "deepseek-v3" else []) for kind in KINDS]
)
slow_but_for_one = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "llama" else SLOW) for kind in KINDS]
)


def config(**keys: object) -> SftConfig:
    return SftConfig(model_name="x", hf_path="y", opt_type="sgd", adam_b1=0.0, gradient_clipping_threshold=0.0, **keys)


def one_step(
    kind: str,
    keys: SftConfig,
    batch: Batch,
    *,
    devices: int = 1,
    accumulate: int = 1,
    compute: Compute | None = None,
) -> tuple[param.Tree, dict[str, float]]:
    """One SGD step at a learning rate of one: the change of the weights is the gradient."""
    mesh, model = mesh_lib.make(keys, jax.devices()[:devices]), kind_model(kind)
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, model.spec)
        params = param.initialise(model.spec, jax.random.key(0), jnp.float32, mesh, scale=0.1)
        before = jax.device_get(params)
        state = step.init_state(params, tx, model.spec, mesh)
        run = step.make_train_step(model, sft, tx, compute or Compute())
        state, metrics = run(state, step.place(batch, mesh, accumulate=accumulate), jnp.float32(1.0))
        after = jax.device_get(state.params)
    return jax.tree.map(np.subtract, before, after), {name: float(value) for name, value in metrics.items()}


def assert_equal_steps(one: tuple, other: tuple, *but: str) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), one[0], other[0])
    mine, theirs = ({name: value for name, value in of.items() if name not in but} for of in (one[1], other[1]))
    assert mine == pytest.approx(theirs, rel=2e-5)


BATCH = make_batch(rows=8)


@functools.cache
def reference(kind: str) -> tuple[param.Tree, dict[str, float]]:
    """The step on one device, the whole batch at a time."""
    return one_step(kind, config(), BATCH)


@pytest.mark.parametrize("accumulate", [2, pytest.param(4, marks=SLOW)])
@slow_latent
def test_batch_times_accumulation(kind: str, accumulate: int) -> None:
    assert_equal_steps(one_step(kind, config(), BATCH, accumulate=accumulate), reference(kind), *PER_MICRO_BATCH)


@slow_latent
def test_remat_on_and_off(kind: str) -> None:
    """Which tokens go to which experts is not to differ between the passes."""
    assert_equal_steps(one_step(kind, config(), BATCH, compute=Compute(remat="dots")), reference(kind))


@slow_but_for_one
def test_full_remat_on_and_off(kind: str) -> None:
    assert_equal_steps(one_step(kind, config(), BATCH, compute=Compute(remat="full")), reference(kind))


AXES = ("data", "fsdp", "expert", "tensor", "context")
MESHES = [
    *(("llama", mesh) for mesh in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (2, 1, 1, 4))),
    *(("gemma3-text", mesh) for mesh in ((2, 2, 1, 2), (1, 8, 1, 1))),
    ("qwen3-moe", (1, 2, 1, 1, 4)),
    *((kind, mesh) for kind in WITH_EXPERTS for mesh in ((1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 8, 1), (2, 2, 1, 2))),
]
QUICK = ("qwen3-moe", (1, 2, 2, 2))


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [pytest.param(*case, marks=[] if case == QUICK or case[0] == "llama" else SLOW) for case in MESHES],
    ids=str,
)
def test_one_device_equals_eight(kind: str, mesh: tuple[int, ...]) -> None:
    axes = {f"ici_{axis}_parallelism": size for axis, size in zip(AXES, mesh, strict=False)}
    assert_equal_steps(one_step(kind, config(**axes), BATCH, devices=8), reference(kind))


def test_eight_devices_accumulate_too() -> None:
    keys = config(ici_tensor_parallelism=2)
    assert_equal_steps(one_step("llama", keys, BATCH, devices=4, accumulate=2), reference("llama"))


@kinds
def test_packed_equals_padded(kind: str) -> None:
    rows = []
    for row in range(len(BATCH.tokens_BT)):
        for segment in (1, 2):
            where = np.flatnonzero(BATCH.segments_BT[row] == segment)
            padded = np.zeros((4, BATCH.tokens_BT.shape[1]), np.int32)
            for line, array in enumerate((BATCH.tokens_BT, BATCH.positions_BT, BATCH.segments_BT > 0, BATCH.mask_BT)):
                padded[line, : len(where)] = array[row, where]
            rows.append(padded)
    padded = Batch(*np.stack(rows, axis=1))
    assert_equal_steps(reference(kind), one_step(kind, config(), padded))


@slow_but_for_one
def test_the_gradient_is_that_of_the_mean_over_trained_tokens(kind: str) -> None:
    """Against plain autodiff of whole logits, which shares nothing with the chunked loss."""
    model = kind_model(kind)

    def loss(params: param.Tree) -> jax.Array:
        logp_BTV = jax.nn.log_softmax(model.logits(params, BATCH, Compute()))
        logp_BT = jnp.take_along_axis(logp_BTV[:, :-1], BATCH.tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return -(logp_BT * BATCH.mask_BT[:, 1:]).sum() / BATCH.mask_BT.sum()

    one_device = mesh_lib.make(config(), jax.devices()[:1])
    params = param.initialise(model.spec, jax.random.key(0), jnp.float32, one_device, scale=0.1)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert reference(kind)[1]["loss"] == pytest.approx(float(value), rel=2e-5)
    ours = reference(kind)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), ours, jax.device_get(gradient))


@pytest.mark.parametrize(("kind", "mesh"), [("llama", (4, 1, 2)), pytest.param("deepseek-v3", (2, 2, 2), marks=SLOW)])
def test_weights_and_moments_are_sharded(kind: str, mesh: tuple[int, int, int]) -> None:
    axes = dict(zip(("ici_fsdp_parallelism", "ici_expert_parallelism", "ici_tensor_parallelism"), mesh, strict=True))
    keys, model = SftConfig(model_name="x", hf_path="y", **axes), kind_model(kind)
    mesh = mesh_lib.make(keys)
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, model.spec)
        params = param.initialise(model.spec, jax.random.key(0), jnp.float32, mesh)
        state = step.init_state(params, tx, model.spec, mesh)
        run = step.make_train_step(model, sft, tx, Compute())
        for _ in range(2):
            state, _ = run(state, step.place(BATCH, mesh, accumulate=1), jnp.float32(0.1))
    for tree in (state.params, state.opt_state):
        gates = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "gate" in str(path[-1])]
        assert gates
        for gate in gates:
            assert gate.addressable_shards[0].data.size == gate.size // 8


@kinds
def test_a_dropped_metric_would_show(kind: str) -> None:
    usual = {"loss", "mean_token_accuracy", "num_trained_tokens", "num_tokens", "grad_norm"}
    routers = {"load_balance_loss", "router_z_loss", "expert_load/max"}
    assert set(reference(kind)[1]) == usual | (routers if kind in WITH_EXPERTS else set())

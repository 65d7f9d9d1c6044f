"""The estimate of memory against what the compiler counts, and the advice where it does not fit."""

import jax
import jax.numpy as jnp
import pytest

from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.config import RlConfig, SftConfig
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.train import memory, optimizer, step
from luthier.train.tuning import Tuning
from luthier.types import Batch
from tiny import TINY

MODEL = Model.from_hf(
    TINY | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1024}, "x"
)

ROWS = {"row_length": 256, "accumulates": False}
ROW = "max_target_length=256"


def config(**keys: object) -> SftConfig:
    return SftConfig(model_name="x", hf_path="y", max_target_length=256, **keys)


def compiled_bytes(keys: SftConfig, rows: int, compute: Compute) -> float:
    mesh = mesh_lib.make(keys, jax.devices()[:1])
    with mesh_lib.use(mesh):
        tx = optimizer.make(keys, MODEL.spec)
        state = step.abstract_state(tx, MODEL.spec, jnp.float32, mesh)
        ids = jax.ShapeDtypeStruct((1, rows, 256), jnp.int32)
        batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct((1, rows, 256), jnp.bool))
        program = step.make_train_step(MODEL, sft, tx, compute)
        size = memory.of_program(program.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)).compile())
    assert size is not None
    return size


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_the_estimate_is_near_the_compilers_count(policy: str) -> None:
    keys, compute = config(remat_policy=policy), Compute(remat=policy)
    plan = memory.estimate(keys, Tuning(MODEL), mesh_lib.make(keys, jax.devices()[:1]), compute, **ROWS)
    for rows in (4, 16):
        actual = compiled_bytes(keys, rows, compute)
        assert plan.total(rows) - memory.PROCESS == pytest.approx(actual, rel=0.35), rows


def test_a_plan_over_the_limit_says_what_fits() -> None:
    plan = memory.Plan(fixed=10 * GIB, per_row=2 * GIB)
    memory.check(config(per_device_batch_size=4), plan, limit=18 * GIB, row=ROW)
    memory.check(config(per_device_batch_size=4), plan, limit=14 * GIB, row=ROW)  # the estimate may be a third too high
    memory.check(config(per_device_batch_size=400), plan, limit=None, row=ROW)
    words = r"needs about 26\.0 GiB .* 18\.5 GiB are free: per_device_batch_size=4 fits"
    with pytest.raises(UserError, match=words) as no:
        memory.check(config(per_device_batch_size=8), plan, limit=18.5 * GIB, row=ROW)
    assert "gradient_accumulation_steps=2 the step stays the same" in str(no.value)
    with pytest.raises(UserError, match="not even one row fits: set remat_policy=full, mu_dtype=bfloat16"):
        memory.check(config(), plan, limit=11 * GIB, row=ROW)


def test_vllms_weights_take_nothing_of_the_trainers() -> None:
    mesh, tuning, compute = mesh_lib.make(config(), jax.devices()[:1]), Tuning(MODEL), Compute(jnp.bfloat16)

    def taken(**keys: object) -> float:
        return memory.sampling(RlConfig(model_name="x", **keys), tuning, mesh, compute) / param.count(MODEL.spec)

    assert taken() == taken(max_staleness=1) == 2  # bytes of a weight: the embedded engine's copy
    assert taken(rollout_engine="vllm") == taken(rollout_engine="vllm", max_staleness=1) == 0
    assert taken(rollout_engine="vllm", beta=0.1) == 4  # the reference policy's


def test_more_devices_take_less_each() -> None:
    meshes = [mesh_lib.make(config(), jax.devices()[:n]) for n in (1, 8)]
    one, eight = (memory.estimate(config(), Tuning(MODEL), mesh, Compute(), **ROWS) for mesh in meshes)
    assert eight.fixed < one.fixed

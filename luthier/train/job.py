"""What a run is made of before there are rows and weights, and its steps, compiled from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier.checkpoint import huggingface, peft, placing
from luthier.checkpoint.source import Source
from luthier.checkpoint.state import Checkpoints
from luthier.config import RlConfig, SftConfig
from luthier.errors import UserError
from luthier.memory import available
from luthier.model import lora, param
from luthier.model.compute import Compute, chosen
from luthier.model.model import Model
from luthier.model.param import Param, Tree
from luthier.train import balance, memory, optimizer, step, tuning
from luthier.train.balance import Balance
from luthier.train.tuning import Base, Tuning
from luthier.types import Batch

C = TypeVar("C", bound=SftConfig | RlConfig)


@dataclass(frozen=True)
class Job(Generic[C]):
    """A configuration whose keys were found good, and what follows from them."""

    config: C
    source: Source
    model: Model
    mesh: Mesh
    compute: Compute
    tuning: Tuning
    optimizer: optax.GradientTransformation

    @property
    def batch_rows(self) -> int:
        """Rows of a micro-batch over all devices."""
        return self.config.per_device_batch_size * mesh_lib.batch_shards(self.mesh)

    @property
    def abstract_state(self) -> step.TrainState:
        """The train state's shapes, types and shardings."""
        return step.abstract_state(self.optimizer, self.tuning.spec, self.tuning.trained_dtype, self.mesh)

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out."""
        keys = self.config
        return bool(keys.hf_eval_path or keys.hf_eval_split or keys.eval_fraction)


@dataclass(frozen=True)
class Programs:
    """The compiled steps, or the promise of them."""

    train: Future[Callable[..., Any]]
    evaluate: Future[Callable[..., Any]] | None


def prepare(config: C, source: Source, model: Model, mesh: Mesh) -> Job[C]:
    """Return the job, after checking that keys, mesh, kernel and checkpoint fit the model.

    Raises UserError where one does not.
    """
    balance.check(config, model)
    scored = isinstance(config, RlConfig) and config.rollout_engine == "local"
    compute = chosen(config, remat=config.remat_policy, scored=scored)
    param.shardings(model.spec, mesh)  # raises where the mesh does not divide the model
    model.check_kernel(compute)
    if source.kind != "random":
        huggingface.check(source, model.spec, model.config.ignored)
    elif config.lora_init == "loftq":
        raise UserError("lora_init=loftq needs the weights of a checkpoint: leave it out with random ones.")
    trained = tuning.of(config, model, jnp.dtype(config.weight_dtype), compute.dtype)
    param.shardings(trained.spec, mesh)
    return Job(config, source, model, mesh, compute, trained, optimizer.make(config, trained.spec))


def step_rows(job: Job[SftConfig]) -> int:
    """Return the rows of a whole step."""
    return job.batch_rows * job.config.gradient_accumulation_steps


def plan_memory(job: Job[SftConfig]) -> memory.Plan:
    """Return the bytes that the job's steps take. Raises UserError where they are more than there are."""
    keys = job.config
    plan = memory.estimate(
        keys,
        job.tuning,
        job.mesh,
        job.compute,
        row_length=keys.max_target_length,
        accumulates=keys.gradient_accumulation_steps > 1,
    )
    memory.check(keys, plan, available(job.mesh), f"max_target_length={keys.max_target_length}")
    return plan


def compile_steps(job: Job[SftConfig], algorithm: step.Algorithm, background: ThreadPoolExecutor) -> Programs:
    """Start compiling the steps, the first one needed first, while the caller reads rows and weights."""

    def compiled(trace: Callable[..., jax.stages.Traced]) -> Callable[..., Any]:
        with mesh_lib.use(job.mesh):
            return trace(job, algorithm).lower().compile()

    first = background.submit(compiled, trace_evaluation) if job.evaluates else None
    return Programs(background.submit(compiled, trace_training), first)


def trace_training(job: Job[SftConfig], algorithm: step.Algorithm) -> jax.stages.Traced:
    """Return the train step as it is before it is compiled. To be called with the job's mesh in use."""
    program = step.make_train_step(
        job.model,
        algorithm,
        job.optimizer,
        job.compute,
        Balance.of(job.config),
        job.tuning.weights,
        job.config.seed if job.config.lora_dropout else None,
    )
    batch = _abstract_batch(job, job.config.gradient_accumulation_steps, job.batch_rows)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return program.trace(job.abstract_state, batch, rate, job.tuning.abstract_base(job.mesh))


def trace_evaluation(job: Job[SftConfig], algorithm: step.Algorithm) -> jax.stages.Traced:
    """Return the evaluation step as it is before it is compiled. To be called with the job's mesh in use."""
    program = step.make_eval_step(job.model, algorithm, job.compute, job.tuning.weights)
    base = job.tuning.abstract_base(job.mesh)
    return program.trace(job.abstract_state.params, _abstract_batch(job, job.batch_rows), base)


def load(job: Job, checkpoints: Checkpoints | None) -> tuple[Base | None, step.TrainState, dict[str, Any] | None]:
    """Return the weights that stay, the train state, and the data's: the last checkpoint's, or those of a start."""
    base = _base(job)
    if checkpoints is not None and checkpoints.latest() is not None:
        return base, *checkpoints.restore(job.abstract_state)
    folder = tuning.path(job.config)
    trained = peft.load(folder, job.tuning.spec, job.mesh) if folder else reference(job, base)
    return base, step.init_state(trained, job.optimizer, job.tuning.spec, job.mesh), None


def reference(job: Job, base: Base | None) -> Tree:
    """Return what stands for the model that training is held against: of adapters, one that changes nothing."""
    if base is None:
        return _weights(job, job.tuning.weight_dtype)
    return _fresh(job, base.params) if base.begun is None else jax.tree.map(jnp.copy, base.begun)


def _base(job: Job) -> Base | None:
    if job.tuning.adapter is None:
        return None
    params = _weights(job, job.tuning.base_dtype, job.tuning.quantization)
    return Base(params, None if job.tuning.adapter.init == "default" else _fresh(job, params))


def _weights(job: Job, dtype: Any, quantization: str = "") -> Tree:
    model = job.model
    if job.source.kind == "random":
        return placing.random(model.spec, jax.random.key(job.config.seed), quantization, dtype, job.mesh)
    return huggingface.load(job.source, model.spec, dtype, job.mesh, model.config.ignored, quantization=quantization)


def _fresh(job: Job, params: Tree) -> Tree:
    """Return a new adapter over a base of ``params``."""

    def exact(declared: Param) -> jax.Array:
        """Return a weight as it was before it was quantised."""
        alone = {"weight": declared}
        return huggingface.load(job.source, alone, jnp.float32, job.mesh, ignored=(".*",))["weight"]

    assert job.tuning.adapter is not None
    key = jax.random.key(job.config.seed)
    return lora.initialise(job.model.spec, params, job.tuning.adapter, key, job.mesh, exact)


def _abstract_batch(job: Job[SftConfig], *rows: int) -> Batch:
    shape = (*rows, job.config.max_target_length)
    sharding = step.batch_sharding(job.mesh, accumulated=len(rows) > 1)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, jnp.bool, sharding=sharding))

"""What a step is made of, the same for every method, and the supervised train step and evaluation step.

An ``Objective`` gives the loss of a micro-batch. Gradients are of its *sum*; sums, weights and metrics are added over
micro-batches, and divided once. On a mesh the compiler adds over devices and hosts too, since every reduction here is
over global arrays.

Left out on purpose: the policy step, whose micro-batches are added up by the host (``policy_step``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier import processes
from luthier.algorithms import is_linear, masked
from luthier.model import cpu, param
from luthier.model.compute import Compute
from luthier.model.cross_entropy import TokenScores
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.train import optimizer as optimizer_lib
from luthier.train.balance import NONE, Balance, balanced
from luthier.types import Array, Batch, Loss, PolicyBatch

Algorithm = Callable[..., Loss]
Objective = Callable[[Tree, Any], Loss]
"""``(trained, micro) -> Loss``."""
Weights = Callable[..., Tree]
"""``(trained, base, key) -> the model's weights``: see ``tuning``."""
Metrics = dict[str, jax.Array]
AnyBatch = TypeVar("AnyBatch", Batch, PolicyBatch)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step takes and gives back: what is trained, the optimizer's state, and the number of steps taken."""

    params: Tree
    opt_state: Tree
    step: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Running:
    """What is added up over micro-batches: the fp32 gradient of the losses' sum, and the losses."""

    gradient: Tree
    loss: Loss


def own(trained: Tree, base: None = None, key: None = None) -> Tree:
    """Return the weights of a model that is trained whole."""
    return trained


def running(objective: Objective, params: Tree, micro: Any) -> Running:
    """Return loss and gradient of one micro-batch."""

    def loss_sum(params: Tree) -> tuple[jax.Array, Loss]:
        loss = objective(params, micro)
        return loss.sum, loss

    gradient, loss = jax.grad(loss_sum, has_aux=True)(params)
    return Running(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), loss)


def nothing(like: Running) -> Running:
    """Return what adds nothing, in the shapes of ``like``."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    lowest = jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), like.loss.maxima)
    return replace(zeros, loss=replace(zeros.loss, maxima=lowest))


def added(one: Running, other: Running) -> Running:
    """Return both together."""
    total = jax.tree.map(jnp.add, one, other)
    greatest = jax.tree.map(jnp.maximum, one.loss.maxima, other.loss.maxima)
    return replace(total, loss=replace(total.loss, maxima=greatest))


def updated(
    optimizer: optax.GradientTransformation, state: TrainState, total: Running, learning_rate: jax.Array
) -> tuple[TrainState, Metrics]:
    """Return the state after one step along the mean gradient, and the step's metrics."""
    gradient = jax.tree.map(lambda g: g / jnp.maximum(total.loss.weight, 1.0), total.gradient)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda w, u: (w + learning_rate * u).astype(w.dtype), state.params, updates)
    metrics = means(total.loss) | {"grad_norm": optax.global_norm(gradient)}
    return TrainState(params, opt_state, state.step + 1), metrics


def means(loss: Loss) -> Metrics:
    """Return the loss and its metrics, divided by what they weigh; 0 where nothing was weighed."""
    metrics = {name: masked.ratio(*pair) for name, pair in loss.metrics.items()}
    maxima = {name: jnp.where(jnp.isneginf(value), 0.0, value) for name, value in loss.maxima.items()}
    return {"loss": masked.ratio(loss.sum, loss.weight), **metrics, **maxima, **loss.counts}


def make_train_step(
    model: Model,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    compute: Compute,
    balance: Balance = NONE,
    weights: Weights = own,
    dropout: int | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return ``step(state, batch, learning_rate, base=None) -> (state, metrics)``; the state given is donated.

    The batch's arrays are ``[A, B, T]``: A micro-batches. ``weights`` makes the model's weights of those trained and
    of the ``base``. ``dropout`` is the seed of what is dropped, differently in each step and micro-batch.
    """

    def objective(params: Tree, micro: Batch) -> Loss:
        cotangent_BT = None
        if is_linear(algorithm):
            anywhere = jnp.zeros(micro.tokens_BT.shape, jnp.float32)
            cotangent_BT = jax.grad(lambda logp_BT: algorithm(logp_BT, micro).sum)(anywhere)
        scores = model.score(params, micro, compute, cotangent_BT)
        return balanced(_measured(algorithm, scores, micro), scores.routed, balance)

    def step(
        state: TrainState, batch: Batch, learning_rate: jax.Array, base: Tree = None
    ) -> tuple[TrainState, Metrics]:
        key = None if dropout is None else jax.random.fold_in(jax.random.key(dropout), state.step)

        def of_micro(number: jax.Array, micro: Batch) -> Running:
            its_own = None if key is None else jax.random.fold_in(key, number)

            def of_trained(trained: Tree, micro: Batch) -> Loss:
                return objective(weights(trained, base, its_own), micro)

            return running(of_trained, state.params, micro)

        with compute.precision():
            total = _accumulated(of_micro, batch)
        return updated(optimizer, state, total, learning_rate)

    return jax.jit(step, donate_argnums=0, compiler_options=cpu.compiler_options())


def make_eval_step(model: Model, algorithm: Algorithm, compute: Compute, weights: Weights = own) -> Callable[..., Loss]:
    """Return ``evaluate(trained, batch, base=None) -> Loss`` over a batch ``[B, T]``; ``weights`` as for a step."""

    def evaluate(trained: Tree, batch: Batch, base: Tree = None) -> Loss:
        with compute.precision():
            scores = model.score(weights(trained, base), batch, compute)
        return _measured(algorithm, scores, batch)

    return jax.jit(evaluate)


def init_state(params: Tree, optimizer: optax.GradientTransformation, spec: Tree, mesh: Mesh) -> TrainState:
    """Return the state before the first step, its moments sharded as the weights are."""
    placed = optimizer_lib.state_shardings(optimizer, params, spec, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=placed)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P())))


def abstract_state(optimizer: optax.GradientTransformation, spec: Tree, dtype: Any, mesh: Mesh) -> TrainState:
    """Return the state's shapes, types and shardings, for compiling and for restoring into."""
    params = param.abstract(spec, dtype, mesh)
    placed = optimizer_lib.state_shardings(optimizer, params, spec, mesh)
    opt_state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, params),
        placed,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return TrainState(params, opt_state, step)


def batch_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Return how a batch's arrays are split: rows over the batch axes, micro-batches and time whole."""
    return NamedSharding(mesh, P(None, mesh_lib.BATCH_AXES) if accumulated else P(mesh_lib.BATCH_AXES))


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Return which of the ``rows`` of a micro-batch lie on this process's devices."""
    held = batch_sharding(mesh, accumulated=False).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index or ...] for index in held.values()]))


def own_places(mesh: Mesh, rows: int, accumulate: int) -> np.ndarray:
    """Return which rows of a whole step, ``accumulate`` micro-batches of ``rows`` one after the other, those are."""
    return np.add.outer(np.arange(accumulate) * rows, own_rows(mesh, rows)).reshape(-1)


def share(batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """Return of a micro-batch of all rows those that this process is to ``place``."""
    return jax.tree.map(lambda rows: rows[own_rows(mesh, len(rows))], batch) if processes.several() else batch


def place(batch: AnyBatch, mesh: Mesh, *, accumulate: int | None = None) -> AnyBatch:
    """Put this process's rows on its devices, as ``[A, B, T]`` where ``accumulate`` gives A, else as they are.

    The arrays are those of all processes. Two processes that hold the same rows, split by another axis, both give them.
    """
    sharding, axis = batch_sharding(mesh, accumulated=accumulate is not None), 0 if accumulate is None else 1
    shards = mesh_lib.batch_shards(mesh)
    own = len(own_rows(mesh, shards))

    def put(rows: np.ndarray) -> jax.Array:
        if accumulate is not None:
            rows = rows.reshape(accumulate, -1, *rows.shape[1:])
        shape = list(rows.shape)
        shape[axis] *= shards
        shape[axis] //= own
        return jax.make_array_from_process_local_data(sharding, rows, tuple(shape))

    return jax.tree.map(put, batch)


def _accumulated(of_micro: Callable[[jax.Array, Batch], Running], batch: Batch) -> Running:
    """Add up over the leading axis, holding one running sum; micro-batches are numbered from 0."""
    numbers_A = jnp.arange(batch.tokens_BT.shape[0])
    first = jax.tree.map(lambda x: x[0], (numbers_A, batch))
    if len(numbers_A) == 1:
        return of_micro(*first)
    start = nothing(jax.eval_shape(of_micro, *first))
    return jax.lax.scan(lambda total, micro: (added(total, of_micro(*micro)), None), start, (numbers_A, batch))[0]


def _measured(algorithm: Algorithm, scores: TokenScores, batch: Batch) -> Loss:
    """Return the loss with the metrics of every supervised step."""
    loss = algorithm(scores.logp_BT, batch)
    correct = masked.masked_sum(scores.correct_BT, batch.mask_BT)
    counts = {"num_trained_tokens": loss.weight, "num_tokens": masked.count(batch.segments_BT > 0)}
    metrics = loss.metrics | {"mean_token_accuracy": (correct, loss.weight)}
    return replace(loss, metrics=metrics, counts=loss.counts | counts)

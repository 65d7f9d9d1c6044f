"""The train step and the evaluation step: one compiled program each.

Gradients are of the *sum* over trained tokens; sums and weights are added over micro-batches, and divided once. On a
mesh the compiler adds over devices and hosts too, since every reduction here is over global arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.algorithms import is_linear, masked
from luthier.model import cpu, param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.train import optimizer as optimizer_lib
from luthier.types import Array, Batch, Loss

Algorithm = Callable[..., Loss]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step takes and gives back: weights, the optimizer's state, and the number of steps taken."""

    params: Tree
    opt_state: Tree
    step: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Totals:
    """Sums over the tokens of a batch, to be divided once."""

    loss: Array
    correct: Array
    weight: Array
    tokens: Array


def make_train_step(
    model: Model, algorithm: Algorithm, optimizer: optax.GradientTransformation, compute: Compute
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Return ``step(state, batch, learning_rate) -> (state, metrics)``; the state given is donated.

    The batch's arrays are ``[A, B, T]``: A micro-batches.
    """

    def step(state: TrainState, batch: Batch, learning_rate: jax.Array) -> tuple[TrainState, Metrics]:
        gradient, totals = _accumulate(lambda micro: _gradient(model, algorithm, compute, state.params, micro), batch)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(totals.weight, 1.0), gradient)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = jax.tree.map(lambda w, u: (w + learning_rate * u).astype(w.dtype), state.params, updates)
        metrics = _means(totals) | {"grad_norm": optax.global_norm(gradient)}
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=cpu.compiler_options())


def make_eval_step(model: Model, algorithm: Algorithm, compute: Compute) -> Callable[[Tree, Batch], Totals]:
    """Return ``evaluate(params, batch) -> Totals`` over a batch ``[B, T]``."""

    def evaluate(params: Tree, batch: Batch) -> Totals:
        with compute.precision():
            scores = model.score(params, batch, compute)
        return _totals(algorithm(scores.logp_BT, batch), scores.correct_BT, batch)

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


def place(batch: Batch, mesh: Mesh, *, accumulate: int | None = None) -> Batch:
    """Put this host's rows on the devices, as ``[A, B, T]`` where ``accumulate`` gives A, else ``[B, T]``."""
    sharding = batch_sharding(mesh, accumulated=accumulate is not None)

    def put(rows: np.ndarray) -> jax.Array:
        if accumulate is not None:
            rows = rows.reshape(accumulate, -1, rows.shape[-1])
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(put, batch)


def _gradient(model: Model, algorithm: Algorithm, compute: Compute, params: Tree, micro: Batch) -> tuple[Tree, Totals]:
    def loss_sum(params: Tree) -> tuple[jax.Array, Totals]:
        cotangent_BT = None
        if is_linear(algorithm):
            anywhere = jnp.zeros(micro.tokens_BT.shape, jnp.float32)
            cotangent_BT = jax.grad(lambda logp_BT: algorithm(logp_BT, micro).sum)(anywhere)
        scores = model.score(params, micro, compute, cotangent_BT)
        loss = algorithm(scores.logp_BT, micro)
        return loss.sum, _totals(loss, scores.correct_BT, micro)

    with compute.precision():
        gradient, totals = jax.grad(loss_sum, has_aux=True)(params)
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), totals


def _accumulate(gradient_of: Callable[[Batch], tuple[Tree, Totals]], batch: Batch) -> tuple[Tree, Totals]:
    """Add up gradients and totals over the leading axis, holding one running sum."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens_BT.shape[0] == 1:
        return gradient_of(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, first))
    add = lambda running, micro: (jax.tree.map(jnp.add, running, gradient_of(micro)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, batch)[0]


def _totals(loss: Loss, correct_BT: jax.Array, batch: Batch) -> Totals:
    return Totals(
        loss=loss.sum,
        correct=masked.masked_sum(correct_BT, batch.mask_BT),
        weight=loss.weight,
        tokens=masked.count(batch.segments_BT > 0),
    )


def _means(totals: Totals) -> Metrics:
    return {
        "loss": masked.ratio(totals.loss, totals.weight),
        "mean_token_accuracy": masked.ratio(totals.correct, totals.weight),
        "num_trained_tokens": totals.weight,
        "num_tokens": totals.tokens,
    }

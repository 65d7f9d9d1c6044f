"""The policy step: its micro-batches are added up one by one, since their number differs from step to step.

Four programs, each of one shape for the whole run and compiled from shapes alone: ``start`` gives an empty running sum,
``accumulate`` adds a micro-batch to it, ``apply`` divides once and updates the weights, and ``score`` gives the
log-probs that a policy is held against, its own of before or a reference's.

Left out on purpose: the losses (``algorithms.policy``), and what is trained on (``data.groups``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.algorithms import masked
from luthier.data.groups import Layout
from luthier.model import cpu
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.rollout.mismatch import mismatch
from luthier.train import step
from luthier.train.balance import NONE, Balance, balanced
from luthier.types import Loss, PolicyBatch, Rollouts


@dataclass(frozen=True)
class Policy:
    """A model as a policy and the loss it is trained by, ``loss(logp, rollouts, entropy) -> Loss``.

    Log-probs are at ``temperature``, the sampler's. Entropies are computed if ``entropy``. ``own_old`` says that old
    log-probs are the trainer's own: then they, and not the current ones, are compared with the sampler's. ``balance``
    is what is asked of a mixture's routers. ``weights`` makes the model's weights of those trained and of the base.
    """

    model: Model
    loss: Callable[..., Loss]
    compute: Compute
    temperature: float = 1.0
    entropy: bool = False
    own_old: bool = False
    balance: Balance = NONE
    weights: step.Weights = step.own


@dataclass(frozen=True)
class Programs:
    """The promises of the compiled programs; they take batches as ``step.place`` puts them.

    ``start(weight) -> Running``, a sum of nothing that weighs as much as what need not be computed;
    ``accumulate(trained, running, micro, base) -> Running``, to which the running sum is donated; ``apply(state,
    running, learning_rate) -> (state, metrics)``, to which the state is donated, and which changes nothing but the
    number of the step where the loss weighs nothing; ``score(trained, micro, base) -> logp [B, S, C]``.
    """

    start: Future[Callable[..., Any]]
    accumulate: Future[Callable[..., Any]]
    apply: Future[Callable[..., Any]]
    score: Future[Callable[..., Any]] | None


Trace = Callable[[], jax.stages.Traced]
"""What traces a program, to be called with its mesh in use."""


def compile_steps(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    state: step.TrainState,
    layout: Layout,
    mesh: Mesh,
    background: ThreadPoolExecutor,
    **asked: Any,
) -> Programs:
    """Start compiling what ``traces`` gives, in its order."""

    def compiled(trace: Trace) -> Callable[..., Any]:
        with mesh_lib.use(mesh):
            return trace().lower().compile()

    wanted = traces(policy, optimizer, state, layout, mesh, **asked)
    promised = {name: background.submit(compiled, trace) for name, trace in wanted.items()}
    return Programs(promised["start"], promised["accumulate"], promised["apply"], promised.get("score"))


def traces(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    state: step.TrainState,
    layout: Layout,
    mesh: Mesh,
    *,
    reference: bool = False,
    old: bool = True,
    scores: bool = True,
    base: Tree = None,
) -> dict[str, Trace]:
    """Return the programs for the abstract ``state`` and ``base``, by their names in ``Programs``, first needed first.

    ``reference`` and ``old`` say which log-probs rollouts have, ``scores`` that ``score`` is wanted.
    """
    micro = abstract_batch(layout, mesh, reference=reference, old=old)
    total = _abstract_running(policy, state.params, micro, mesh, base)
    placed = _shardings(total)

    def traced(function: Callable[..., Any], *arguments: Any, **options: Any) -> Trace:
        return lambda: jax.jit(function, compiler_options=cpu.compiler_options(), **options).trace(*arguments)

    number = jax.ShapeDtypeStruct((), jnp.float32)
    outputs = (_shardings(state), NamedSharding(mesh, P()))
    found = {
        "start": traced(_started(total), number, out_shardings=placed),
        "accumulate": traced(
            _accumulated(policy), state.params, total, micro, base, donate_argnums=1, out_shardings=placed
        ),
        "apply": traced(_applied(optimizer), state, total, number, donate_argnums=0, out_shardings=outputs),
    }
    if not scores:
        return found
    by_row = step.batch_sharding(mesh, accumulated=False)
    return {"score": traced(_scored(policy), state.params, unscored(micro), base, out_shardings=by_row), **found}


def abstract_batch(layout: Layout, mesh: Mesh, *, reference: bool = False, old: bool = True) -> PolicyBatch:
    """Return the shapes, types and shardings of a micro-batch as ``data.groups`` packs it."""
    B, S = layout.rows, layout.sequences
    sharding = step.batch_sharding(mesh, accumulated=False)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids_BT, ids_BM = array(jnp.int32, B, layout.row_length), array(jnp.int32, B, layout.scored)
    places_BSC = array(jnp.int32, B, S, layout.completion_length)
    logp = array(jnp.float32, B * S, layout.completion_length)
    mask, advantages = array(jnp.bool, *logp.shape), array(jnp.float32, B * S)
    rollouts = Rollouts(mask, logp, logp if old else None, logp if reference else None, advantages)
    prefixes_BT = ids_BT if layout.shared else None
    routes_BTLk = array(jnp.int16, *ids_BT.shape, *layout.routes) if layout.routes else None
    return PolicyBatch(ids_BT, ids_BT, ids_BT, prefixes_BT, ids_BM, ids_BM, places_BSC, rollouts, routes_BTLk)


def unscored(micro: PolicyBatch) -> PolicyBatch:
    """Return the micro-batch as ``score`` takes it, without the log-probs that may be what is asked for."""
    return replace(micro, rollouts=replace(micro.rollouts, old_logp_BT=None, reference_logp_BT=None))


def objective(policy: Policy, base: Tree = None) -> step.Objective:
    """Return the policy's loss of a micro-batch, with the metrics of every policy step."""

    def loss_of(trained: Tree, micro: PolicyBatch) -> Loss:
        rollouts, params = micro.rollouts, policy.weights(trained, base)
        logp_BT, _, entropy_BT, routed = policy.model.score_tokens(
            params, micro, policy.compute, temperature=policy.temperature, entropy=policy.entropy
        )
        loss = balanced(policy.loss(logp_BT, rollouts, entropy_BT), routed, policy.balance)
        trainer_logp_BT = rollouts.old_logp_BT if policy.own_old else logp_BT
        apart = mismatch(rollouts.sampler_logp_BT, trainer_logp_BT, rollouts.mask_BT)
        counts = {
            "num_trained_tokens": masked.count(rollouts.mask_BT),
            "num_tokens": masked.count(micro.segments_BT > 0),
        }
        return replace(
            loss,
            metrics=loss.metrics | apart.metrics,
            maxima=loss.maxima | apart.maxima,
            counts=loss.counts | counts,
        )

    return loss_of


def _started(like: step.Running) -> Callable[..., step.Running]:
    def start(weight: jax.Array) -> step.Running:
        empty = step.nothing(like)
        return replace(empty, loss=replace(empty.loss, weight=weight))

    return start


def _accumulated(policy: Policy) -> Callable[..., step.Running]:
    def accumulate(trained: Tree, total: step.Running, micro: PolicyBatch, base: Tree = None) -> step.Running:
        with policy.compute.precision():
            return step.added(total, step.running(objective(policy, base), trained, micro))

    return accumulate


def _applied(optimizer: optax.GradientTransformation) -> Callable[..., tuple[step.TrainState, step.Metrics]]:
    def apply(
        state: step.TrainState, total: step.Running, learning_rate: jax.Array
    ) -> tuple[step.TrainState, step.Metrics]:
        after, metrics = step.updated(optimizer, state, total, learning_rate)

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(total.loss.weight > 0, new, old)

        params = jax.tree.map(kept, after.params, state.params)
        opt_state = jax.tree.map(kept, after.opt_state, state.opt_state)
        return step.TrainState(params, opt_state, after.step), metrics

    return apply


def _scored(policy: Policy) -> Callable[..., jax.Array]:
    def score(trained: Tree, micro: PolicyBatch, base: Tree = None) -> jax.Array:
        with policy.compute.precision():
            params = policy.weights(trained, base)
            scores = policy.model.score_tokens(params, micro, policy.compute, temperature=policy.temperature)
        return scores.logp_BT.reshape(micro.places_BSC.shape)

    return score


def _abstract_running(policy: Policy, trained: Tree, micro: PolicyBatch, mesh: Mesh, base: Tree) -> step.Running:
    def of_micro(trained: Tree, micro: PolicyBatch, base: Tree) -> step.Running:
        return step.running(objective(policy, base), trained, micro)

    with mesh_lib.use(mesh):
        total = jax.eval_shape(of_micro, trained, micro, base)
    whole = NamedSharding(mesh, P())
    return step.Running(
        gradient=jax.tree.map(lambda g, w: _placed(g, w.sharding), total.gradient, trained),
        loss=jax.tree.map(lambda x: _placed(x, whole), total.loss),
    )


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _shardings(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.sharding, tree)

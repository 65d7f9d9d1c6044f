"""Optimizers from optax, told what they need to know of a model's stacked weights, and learning-rate schedules.

The learning rate is an argument of the step, not part of the optimizer: the compiled step then serves any schedule of
any length. So each optimizer here returns updates for a learning rate of one.

Left out on purpose: optimizers of our own, and per-group learning rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.config import TrainKeys
from luthier.model.param import Param, Tree, decay_mask, map_spec, shardings

Transformation = optax.GradientTransformation


def make(keys: TrainKeys, spec: Tree) -> Transformation:
    """Return the optimizer that the keys describe for the weights of ``spec``: clipping, moments, decay, sign."""
    moments = jnp.dtype(keys.mu_dtype)
    decay = optax.add_decayed_weights(keys.adam_weight_decay, mask=decay_mask(spec))
    adam = store_as(optax.scale_by_adam(keys.adam_b1, keys.adam_b2, keys.adam_eps), moments)
    kinds: dict[str, Callable[[], Transformation]] = {
        "adamw": lambda: optax.chain(adam, decay),
        "adafactor": lambda: optax.chain(per_tensor(_adafactor(), spec), decay),
        "muon": lambda: optax.chain(_muon(keys, spec, adam, moments), decay),
        "sgd": lambda: optax.chain(store_as(optax.trace(keys.adam_b1), moments), decay),
    }
    clip = [optax.clip_by_global_norm(keys.gradient_clipping_threshold)] if keys.gradient_clipping_threshold else []
    return optax.chain(*clip, kinds[keys.opt_type](), optax.scale(-1.0))


def schedule(keys: TrainKeys, steps: int) -> Callable[[int], float]:
    """Return the learning rate of each step, counted from 0, of a run of ``steps`` steps.

    The first step of a warm-up of n steps has 1/n of the peak, so that no step is spent at zero. "wsd" (warm-up,
    stable, decay: arXiv 2404.06395) holds the peak and decays linearly at the end.
    """
    peak, final = keys.learning_rate, keys.learning_rate * keys.learning_rate_final_fraction
    warmup = int(keys.warmup_steps_fraction * steps)
    rest = max(steps - warmup, 1)
    stable = rest - int(keys.wsd_decay_steps_fraction * steps)
    kinds: dict[str, Callable[[], Callable[[int], Any]]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, keys.learning_rate_final_fraction),
        "wsd": lambda: optax.linear_schedule(peak, final, max(rest - stable, 1), stable),
    }
    after = kinds[keys.lr_schedule_type]()

    def rate(step: int) -> float:
        return peak * (step + 1) / warmup if step < warmup else float(after(step - warmup))

    return rate


def store_as(inner: Transformation, dtype: Any) -> Transformation:
    """Return ``inner`` with its floating state kept as ``dtype`` between steps and computed in fp32."""

    def cast(state: Tree, to: Any) -> Tree:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Tree) -> Tree:
        return cast(inner.init(cast(params, jnp.float32)), dtype)

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        updates, state = inner.update(cast(updates, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def per_tensor(inner: Transformation, spec: Tree) -> Transformation:
    """Return ``inner`` applied to each Hugging Face tensor by itself, as a matrix where it is one.

    Our arrays stack the layers and split the heads; an optimizer that takes statistics over a whole array must see
    what it would see elsewhere.
    """
    leaves, treedef = jax.tree.flatten(spec, is_leaf=lambda leaf: isinstance(leaf, Param))

    def lift(function: Callable[..., Any], leaf: Param) -> Callable[..., Any]:
        for _ in leaf.stack:
            function = jax.vmap(function)
        return function

    def matrices(tree: Tree) -> list[jax.Array]:
        return [_as_matrix(x, leaf) for x, leaf in zip(treedef.flatten_up_to(tree), leaves, strict=True)]

    def init(params: Tree) -> Any:
        return [lift(inner.init, leaf)(x) for x, leaf in zip(matrices(params), leaves, strict=True)]

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        rows = zip(matrices(updates), state, matrices(params), leaves, strict=True)
        pairs = [lift(inner.update, leaf)(u, s, x) for u, s, x, leaf in rows]
        new = [u.reshape(leaf.shape) for (u, _), leaf in zip(pairs, leaves, strict=True)]
        return treedef.unflatten(new), [s for _, s in pairs]

    return optax.GradientTransformation(init, update)


def state_shardings(optimizer: Transformation, params: Tree, spec: Tree, mesh: Mesh) -> Tree:
    """Return the shardings of the optimizer's state: a weight's own for its moments, whole for the small rest."""
    paths = {path: (leaf.shape, leaf.sharding) for path, leaf in _with_paths(_placed(params, spec, mesh))}
    whole = NamedSharding(mesh, P())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        endings = [paths[keys[start:]] for start in range(len(keys)) if keys[start:] in paths]
        return next((sharding for shape, sharding in endings if shape == leaf.shape), whole)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def _placed(params: Tree, spec: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params, shardings(spec, mesh)
    )


def _with_paths(tree: Tree) -> list[tuple[tuple[str, ...], Any]]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return [(tuple(entry.key for entry in path), leaf) for path, leaf in flat]


def _adafactor() -> Transformation:
    """Adafactor (arXiv 1804.04235) at a learning rate of one, scaled by the size of the weights as published."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _muon(keys: TrainKeys, spec: Tree, adam: Transformation, moments: Any) -> Transformation:
    """Muon on the layers' matrices, scaled to AdamW's update size (arXiv 2502.16982, eq. 4); AdamW on the rest."""
    dimensions = map_spec(lambda param: _muon_dimensions(param), spec)
    labels = map_spec(lambda param: "muon" if _is_hidden_matrix(param) else "adam", spec)
    orthogonal = optax.contrib.scale_by_muon(
        beta=keys.adam_b1, mu_dtype=moments, weight_dimension_numbers=_unmasked(dimensions)
    )
    muon = optax.chain(orthogonal, optax.stateless(lambda updates, _: _map_unmasked(_as_large_as_adam, updates, spec)))
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _is_hidden_matrix(param: Param) -> bool:
    return bool(param.stack) and param.decays and len(_matrix(param)) == 2


def _matrix(param: Param) -> list[tuple[int, ...]]:
    """Return which of our axes the layout joins into each side of the tensor's matrix.

    Experts that are an axis of one tensor have a matrix each.
    """
    axes = dict(zip(param.names, param.slice_axes, strict=True))
    place = {name: number + len(param.stack) for number, name in enumerate(param.names)}
    return [tuple(place[name] for name in side) for side in param.sides if axes[side[0]] != "expert"]


def _muon_dimensions(param: Param) -> optax.contrib.MuonDimensionNumbers | None:
    if not _is_hidden_matrix(param):
        return None
    output, reduction = _matrix(param)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=reduction, output_axis=output)


def _as_large_as_adam(update: jax.Array, param: Param) -> jax.Array:
    sides = (math.prod(update.shape[axis] for axis in side) for side in _matrix(param))
    return update * (0.2 * max(sides) ** 0.5)


def _unmasked(dimensions: Tree) -> Callable[[Tree], Tree]:
    """Return the dimensions as a function of the partitioned tree, whose other leaves optax has masked out."""
    return lambda params: _map_unmasked(lambda _, d: d, params, dimensions)


def _map_unmasked(function: Callable[..., Any], tree: Tree, beside: Tree) -> Tree:
    def masked(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    return jax.tree.map(lambda x, y: x if masked(x) else function(x, y), tree, beside, is_leaf=masked)


def _as_matrix(x: jax.Array, param: Param) -> jax.Array:
    """Join the dimensions of each side; the sides may stand in the other order than in the tensor."""
    side_of = {name: number for number, side in enumerate(param.sides) for name in side}
    sizes = zip(param.names, param.slice_shape, strict=True)
    joined = itertools.groupby(sizes, key=lambda entry: side_of[entry[0]])
    shape = [math.prod(size for _, size in side) for _, side in joined]
    return x.reshape(*x.shape[: len(param.stack)], *shape)

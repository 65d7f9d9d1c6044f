"""Low-rank adapters over frozen weights (LoRA, Hu et al., arXiv 2106.09685), exact against PEFT.

An adapter's weights are a tree of their own, declared like a model's as ``Param``s that carry the names of PEFT's
files, so that drawing, sharding, training, saving and loading them is what it is for any weights. ``attach`` puts them
beside the base's weights as leaves of type ``Lora``, which ``dense`` and ``experts.grouped`` multiply.

Left out on purpose: adapters of embeddings, of the head and of biases; ranks that differ within an adapter; dropout and
DoRA for routed experts, which PEFT refuses too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from luthier.errors import UserError
from luthier.model import param
from luthier.model.low_rank import factors
from luthier.model.param import Param, Tree
from luthier.model.quant import is_quantised
from luthier.model.targets import ALL_LINEAR, Member, Path, Unit, chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """A frozen weight and what is added to it: ``base + scale * b @ a``, as the matrix [out, in] that ``base`` is.

    ``base`` is an array or a quantised weight, ``a`` fp32 ``[..., r, in]`` and ``b`` fp32 ``[..., out, r]``; all have
    the same leading, stacked axes, so that a scan slices them together. ``magnitude`` ``[..., out]`` makes it DoRA
    (arXiv 2402.09353); ``norms`` ``[..., out]`` are then those of the sum's rows, where they are known (``settled``).
    ``key`` is raw key data ``[..., 2]`` of a dropout at ``rate``, None for none. ``gate_BR`` fp32 ``[..., B, r]``
    stands in for ``scale`` where rows of a batch have adapters of their own.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    key: jax.Array | None = None
    gate_BR: jax.Array | None = None
    norms: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    rate: float = field(default=0.0, metadata={"static": True})


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, in PEFT's terms.

    ``targets`` is "all-linear", a regular expression, or a tuple of names: see ``targets.chosen``.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    init: Literal["default", "pissa", "loftq"] = "default"

    @property
    def scale(self) -> float:
        """The factor of ``b @ a``: alpha over the rank, or over its root (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def units(model_spec: Tree, adapter: Adapter) -> list[Unit]:
    """Return what is adapted in a model.

    Raises UserError where a target is not there or cannot be adapted, and where routed experts are to have dropout or
    DoRA.
    """
    found = chosen(model_spec, adapter.targets)
    of_experts = [unit for unit in found if unit.experts]
    for key, on in (("lora_dropout", adapter.dropout > 0), ("use_dora", adapter.dora)):
        if on and of_experts:
            names = ", ".join(dict.fromkeys(unit.module.format(layer="*") for unit in of_experts))
            raise UserError(
                f"{key} is set and {names} is adapted: the weights of routed experts can have neither dropout nor "
                f"DoRA (nor can they in PEFT). Leave {key} out, or name other modules in lora_target_modules."
            )
    return found


def spec(model_spec: Tree, adapter: Adapter) -> Tree:
    """Return the tree of ``Param``s of an adapter: ``a``, ``b`` and with DoRA ``magnitude`` of each target.

    It has the model's branches down to the block, and there the last name of the target's module. Tensors are named
    and laid out as PEFT saves them. Raises as ``units`` does.
    """
    found = units(model_spec, adapter)
    modules = {unit.module for unit in found}
    tree: Tree = {}
    for unit in found:
        tree = _with(tree, unit.path, _declared(unit, adapter, modules))
    return tree


def initialise(
    model_spec: Tree,
    base: Tree,
    adapter: Adapter,
    key: jax.Array,
    mesh: Mesh,
    weights: Callable[[Param], Any] | None = None,
) -> Tree:
    """Return fresh fp32 adapters.

    ``default``: ``a`` is uniform within one over the root of its inputs, as PEFT draws it, and ``b`` zero. ``pissa``:
    what of the base is nearest to it (arXiv 2404.02948), which ``attach`` is to be given as ``origin`` too.
    ``loftq``: what is nearest to that which quantising took from the weights (arXiv 2310.08659, algorithm 1 with one
    step); ``weights(param)`` is to return them as floats, stacked as the base's are, and is called for one target at a
    time. Magnitudes are what the rows' norms are at the start.

    Raises UserError as ``units`` does, and where loftq is asked for over weights that are not quantised.
    """
    declared = spec(model_spec, adapter)
    found = units(model_spec, adapter)
    tree: Tree = {}
    for unit, own in zip(found, jax.random.split(key, len(found)), strict=True):
        frozen = [_at(base, member.path) for member in unit.members]
        floats = _before_quantising(unit, frozen, weights) if adapter.init == "loftq" else None
        placed = param.shardings(_at(declared, unit.path), mesh)
        draw = jax.jit(functools.partial(_drawn, unit, adapter), out_shardings=placed)
        tree = _with(tree, unit.path, draw(jax.random.split(own, len(unit.layers)), frozen, floats))
    return tree


def attach(
    model_spec: Tree,
    base: Tree,
    adapter: Adapter,
    adapters: Tree | None,
    key: jax.Array | None = None,
    origin: Tree | None = None,
) -> Tree:
    """Return the model's weights with adapters at their targets, and all else the base's own arrays.

    ``adapters`` None gives the base as it is. With a ``key`` there is dropout, of its own for each target and layer.
    ``origin``, of the adapters' structure, is what they began as: it is taken off again, so that a base that was not
    changed for them (PiSSA, arXiv 2404.02948) computes the same with them at the start, to rounding.
    """
    if adapters is None:
        return base
    found = units(model_spec, adapter)
    keys = [None] * len(found) if key is None or not adapter.dropout else jax.random.split(key, len(found))
    params = base
    for unit, own in zip(found, keys, strict=True):
        weights = _at(adapters, unit.path)
        a, b = weights["a"], weights["b"]
        if origin is not None:
            first = _at(origin, unit.path)
            a, b = jnp.concatenate([a, first["a"]], axis=-2), jnp.concatenate([b, -first["b"]], axis=-1)
        for member in unit.members:
            leaf = Lora(
                _at(base, member.path),
                a,
                member.rows(b, -2),
                member.rows(weights["magnitude"], -1) if adapter.dora else None,
                None if own is None else jax.random.key_data(jax.random.split(own, len(unit.layers))),
                scale=adapter.scale,
                rate=adapter.dropout,
            )
            params = _with(params, member.path, leaf)
    return params


def settled(model_spec: Tree, params: Tree) -> Tree:
    """Return weights that many passes are to be made with: DoRA's norms of rows, which each would work out, are there.

    They are right as long as neither the base nor the adapter changes.
    """

    def known(declared: Param, weight: Any) -> Any:
        dora = isinstance(weight, Lora) and weight.magnitude is not None
        return replace(weight, norms=_norms(declared, weight)) if dora else weight

    return param.map_spec(known, model_spec, params)


def row_norms(matrix_OI: jax.Array, w: Lora) -> jax.Array:
    """Return the fp32 norms ``[O]`` of the rows of ``w``, whose base is ``matrix_OI``; the sum is never formed.

    By rows, ``|W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 B (A A^T) . B``.
    """
    cross_OR = 2 * w.scale * (matrix_OI @ w.a.T) + w.scale**2 * (w.b @ (w.a @ w.a.T))
    return jnp.sqrt(jnp.sum(jnp.square(matrix_OI), axis=1) + jnp.sum(cross_OR * w.b, axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _norms(declared: Param, w: Lora) -> jax.Array:
    """Return ``row_norms`` of all layers, of which one at a time is a matrix of floats."""
    member = Member((), declared, None)
    return jax.lax.map(lambda layer: row_norms(member.matrix(layer.base), layer), w)


def _declared(unit: Unit, adapter: Adapter, modules: set[str]) -> dict[str, Param]:
    """Declare a target's adapter; ``modules`` are all targets' names."""
    stack = (("layer", unit.layers),)
    (rows, columns), (row_axis, column_axis) = unit.shape, unit.axes
    lead, lead_axes, prefix = unit.lead, unit.lead_axes, f"base_model.model.{_saved_name(unit, modules)}"

    def weight(name: str, layout: str, axes: tuple[str, ...], shape: tuple[int, ...], **more: Any) -> Param:
        return Param(f"{prefix}.{name}", layout, (*lead_axes, *axes), (*lead, *shape), stack=stack, exact=True, **more)

    # PEFT keeps all experts' matrices as one, in the rows of `a` by expert and in the columns of `b` by rank.
    a_layout, b_layout = ("(e r) i -> e r i", "o (r e) -> e o r") if unit.experts else ("r i -> r i", "o r -> o r")
    declared = {
        "a": weight("lora_A.weight", a_layout, ("rank", column_axis), (adapter.rank, columns)),
        "b": weight("lora_B.weight", b_layout, (row_axis, "rank"), (rows, adapter.rank)),
    }
    if adapter.dora:
        declared["magnitude"] = weight("lora_magnitude_vector", "o -> o", (row_axis,), (rows,), init="ones")
    return declared


def _saved_name(unit: Unit, modules: set[str]) -> str:
    """Return the name of the module that PEFT keeps a target's adapter in.

    An experts' tensor is no module: PEFT wraps the module that has it, and wraps it again for the second tensor.
    """
    if not unit.experts:
        return unit.module
    owner, _, name = unit.module.rpartition(".")
    wrapped_again = name == "gate_up_proj" and f"{owner}.down_proj" in modules
    return f"{owner}.base_layer" if wrapped_again else owner


def _before_quantising(unit: Unit, frozen: list[Any], weights: Callable[[Param], Any] | None) -> list[Any]:
    """Return the floats that a target's quantised weights were."""
    if not all(is_quantised(weight) for weight in frozen):
        raise UserError(
            f"lora_init=loftq is for a quantised base, and {unit.module.format(layer='*')} is not quantised. "
            "Set quantization=nf4, or lora_init=default."
        )
    if weights is None:
        raise ValueError("initialise: loftq needs `weights`, the floats that were quantised")
    return [weights(member.param) for member in unit.members]


def _drawn(unit: Unit, adapter: Adapter, keys_L: jax.Array, frozen: list[Any], floats: list[Any] | None) -> Tree:
    """Return a target's fresh adapter, drawn layer by layer, so that one layer's matrices at a time are floats."""

    def whole(weights: list[Any]) -> jax.Array:
        """Return a layer's matrix ``[..., O, I]`` of the weights that are its rows."""
        matrix = jnp.zeros((*unit.lead[1:], *unit.shape), jnp.float32)
        for member, weight in zip(unit.members, weights, strict=True):
            matrix = member.put_rows(matrix, member.matrix(weight), -2)
        return matrix

    def layer(arrays: Any) -> dict[str, jax.Array]:
        key, frozen, floats = arrays
        if adapter.init == "default":
            drawn = _uniform(unit, adapter, key)
        else:
            target = whole(frozen) if floats is None else whole(floats) - whole(frozen)
            drawn = _nearest(target / adapter.scale, adapter.rank, key)
        if adapter.dora:
            start = whole(frozen)
            if floats is not None:  # nothing takes this start off again
                start = start + adapter.scale * drawn["b"] @ drawn["a"]
            drawn["magnitude"] = jnp.linalg.norm(start, axis=-1)
        return drawn

    return jax.lax.map(layer, (keys_L, frozen, floats))


def _uniform(unit: Unit, adapter: Adapter, key: jax.Array) -> dict[str, jax.Array]:
    (rows, columns), lead, bound = unit.shape, unit.lead[1:], unit.shape[1] ** -0.5
    return {
        "a": jax.random.uniform(key, (*lead, adapter.rank, columns), jnp.float32, -bound, bound),
        "b": jnp.zeros((*lead, rows, adapter.rank), jnp.float32),
    }


def _nearest(matrix: jax.Array, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """Return factors near to ``[..., O, I]``."""
    stacked = matrix.reshape(-1, *matrix.shape[-2:])
    a, b = jax.lax.map(lambda one: factors(one, rank, key), stacked)
    lead = matrix.shape[:-2]
    return {"a": a.reshape(*lead, *a.shape[1:]), "b": b.reshape(*lead, *b.shape[1:])}


def _at(tree: Tree, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _with(tree: Tree, path: Path, value: Any) -> Tree:
    """Return nested dicts with ``value`` at ``path``; what was given stays as it is."""
    name, *rest = path
    return {**tree, name: _with(tree.get(name, {}), tuple(rest), value) if rest else value}

"""A weight is declared once; everything else about it is derived from that line.

A decoder's ``spec`` is a tree of ``Param``s. Initialisation, abstract shapes, sharding, the names and shapes of
Hugging Face's tensors, loading and export all follow from it; export is the load arrow read backwards.

Left out on purpose: reading and writing files (``checkpoint``).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from luthier import mesh as mesh_lib

Tree = Any


@dataclass(frozen=True)
class Part:
    """Which entries of a tensor's axis are one weight's own, where several weights lie in one tensor.

    ``axis`` is one of the names of the weight's layout, ``whole`` how many entries it has in the tensor; the weight's
    are every ``step``-th from ``start`` on, as many as its shape says.
    """

    axis: str
    start: int
    whole: int
    step: int = 1


@dataclass(frozen=True)
class Param:
    """One weight.

    ``tensor`` is its Hugging Face name, with a placeholder such as ``{layer}`` for each entry of ``stack``; ``layout``
    is the einops arrow from that tensor to one slice of ours; ``axes`` are our logical axes and ``shape`` their sizes,
    the stacked ones leading. ``stack`` maps each leading axis to the indices of the tensors that are stacked there.
    ``part`` says which part of the tensor is this weight, None for all of it. ``exact``: it is kept in fp32, whatever
    the type of the others.
    """

    tensor: str
    layout: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    stack: tuple[tuple[str, tuple[int, ...]], ...] = ()
    part: Part | None = None
    exact: bool = False

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of one stacked slice, which one Hugging Face tensor fills."""
        return self.shape[len(self.stack) :]

    @property
    def slice_axes(self) -> tuple[str, ...]:
        """The logical axes of one stacked slice."""
        return self.axes[len(self.stack) :]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape that the Hugging Face tensor must have."""
        sizes = self._sizes()
        return tuple(math.prod(sizes[name] for name in side) for side in self.sides)

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """The layout's names in each dimension of the Hugging Face tensor: (output, input) for a matrix."""
        groups = re.findall(r"\(([^)]*)\)|(\w+)", self.layout.split("->")[0])
        return tuple(tuple((group or single).split()) for group, single in groups)

    @property
    def names(self) -> tuple[str, ...]:
        """The layout's names of a slice's dimensions, in the order of ``slice_shape``."""
        return tuple(self.layout.split("->")[1].split())

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix that is computed with in the model's type; vectors and routers stay as they are."""
        return len(self.slice_shape) > 1 and "router" not in self.axes

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases, whatever their shape."""
        return self.init == "normal"

    def dtype(self, of_all: Any) -> Any:
        """Return the type of this weight in a model whose weights are of type ``of_all``."""
        return jnp.float32 if self.exact else of_all

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return {Hugging Face name: index of its slice in our array}."""
        names = [name for name, _ in self.stack]
        places = [list(enumerate(indices)) for _, indices in self.stack]
        return {
            self.tensor.format(**{name: number for name, (_, number) in zip(names, combination, strict=True)}): tuple(
                place for place, _ in combination
            )
            for combination in itertools.product(*places)
        }

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Return one slice of ours from a Hugging Face tensor; a view where the layout allows it."""
        return einops.rearrange(tensor, self.layout, **self._split_sizes())[self._own]

    def into_tensor(self, piece: np.ndarray, tensor: np.ndarray) -> None:
        """Write one slice of ours into a Hugging Face tensor: ``from_tensor`` backwards."""
        left, right = self.layout.split("->")
        whole = piece
        if self.part is not None:
            whole = np.empty(tuple(self._sizes().values()), piece.dtype)
            # What lies between is other weights': it is taken from the tensor, and so put back as it was.
            whole[...] = einops.rearrange(tensor, self.layout, **self._split_sizes())
            whole[self._own] = piece
        tensor[...] = einops.rearrange(whole, f"{right.strip()} -> {left.strip()}", **self._split_sizes())

    def block(self, where: Sequence[slice]) -> tuple[slice, ...]:
        """Return which block of the Hugging Face tensor holds the part ``where`` of one slice of ours.

        ``where`` gives the first entry and the one after the last of each dimension of the slice.
        """
        spans, sizes = self._spans(where), self._sizes()
        block = []
        for first, *others in self.sides:
            inner = math.prod(sizes[name] for name in others)
            block.append(slice(spans[first].start * inner, spans[first].stop * inner))
        return tuple(block)

    def from_block(self, block: np.ndarray, where: Sequence[slice]) -> np.ndarray:
        """Return the part ``where`` of one slice of ours from its ``block``; a view where the layout allows it."""
        spans, sizes = self._spans(where), self._sizes()
        firsts = {side[0] for side in self.sides}
        sizes |= {name: spans[name].stop - spans[name].start for name in firsts}
        joined = {name: sizes[name] for side in self.sides if len(side) > 1 for name in side}
        own = (slice(None, None, spans[name].step) if name in firsts else spans[name] for name in self.names)
        return einops.rearrange(block, self.layout, **joined)[tuple(own)]

    def _spans(self, where: Sequence[slice]) -> dict[str, slice]:
        """Return {name of the layout: which of its entries in the tensor ``where`` has}."""
        spans = dict(zip(self.names, where, strict=True))
        if self.part is not None:
            own, part = spans[self.part.axis], self.part
            last = part.start + (own.stop - 1) * part.step
            spans[part.axis] = slice(part.start + own.start * part.step, last + 1, part.step)
        return spans

    @property
    def _own(self) -> tuple[slice, ...]:
        """Where in the rearranged tensor this weight lies."""
        if self.part is None:
            return ()
        axis, part = self.names.index(self.part.axis), self.part
        end = part.start + self.slice_shape[axis] * part.step
        return (*[slice(None)] * axis, slice(part.start, end, part.step))

    def _sizes(self) -> dict[str, int]:
        """Return {name of the layout: its size in the tensor}."""
        sizes = dict(zip(self.names, self.slice_shape, strict=True))
        return sizes if self.part is None else sizes | {self.part.axis: self.part.whole}

    def _split_sizes(self) -> dict[str, int]:
        joined = [name for side in self.sides if len(side) > 1 for name in side]
        return {name: size for name, size in self._sizes().items() if name in joined}


def declare(sizes: Mapping[str, int]) -> Callable[..., Param]:
    """Return ``weight(tensor, layout, *axes, **kind)``, which makes a ``Param`` of axes of these sizes."""

    def weight(tensor: str, layout: str, *axes: str, **kind: Any) -> Param:
        return Param(tensor, layout, axes, tuple(sizes[axis] for axis in axes), **kind)

    return weight


def stacked(spec: Tree, axis: str, indices: Sequence[int]) -> Tree:
    """Return ``spec`` with a leading ``axis`` over the tensors numbered ``indices``."""

    def stack(param: Param) -> Param:
        return replace(
            param,
            axes=(axis, *param.axes),
            shape=(len(indices), *param.shape),
            stack=((axis, tuple(indices)), *param.stack),
        )

    return map_spec(stack, spec)


def map_spec(function: Callable[..., Any], spec: Tree, *rest: Tree) -> Tree:
    """Map over the ``Param``s of a spec, and over trees of the same structure beside it."""
    return jax.tree.map(function, spec, *rest, is_leaf=lambda leaf: isinstance(leaf, Param))


def leaves(spec: Tree) -> dict[str, Param]:
    """Return {path such as "layers/q": Param}, in the order of the tree."""
    flat, _ = jax.tree.flatten_with_path(spec, is_leaf=lambda leaf: isinstance(leaf, Param))
    return {"/".join(entry.key for entry in path): param for path, param in flat}


def count(spec: Tree) -> int:
    """Return the number of weights."""
    return sum(math.prod(param.shape) for param in leaves(spec).values())


def shardings(spec: Tree, mesh: Mesh) -> Tree:
    """Return the tree of shardings that the table of axes gives."""
    return map_spec(lambda param: mesh_lib.sharding(param.axes, param.shape, mesh), spec)


def abstract(spec: Tree, dtype: Any, mesh: Mesh) -> Tree:
    """Return the tree of shapes, types and shardings, for compiling before the weights are there."""

    def shape(param: Param) -> jax.ShapeDtypeStruct:
        placed = mesh_lib.sharding(param.axes, param.shape, mesh)
        return jax.ShapeDtypeStruct(param.shape, param.dtype(dtype), sharding=placed)

    return map_spec(shape, spec)


def initialise(spec: Tree, key: jax.Array, dtype: Any, mesh: Mesh, scale: float = 0.02) -> Tree:
    """Return random weights: normal with standard deviation ``scale``, norms one, biases zero."""
    names = leaves(spec)

    def build(key: jax.Array) -> Tree:
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        values = {name: _draw(param, keys[name], param.dtype(dtype), scale) for name, param in names.items()}
        return jax.tree.unflatten(jax.tree.structure(map_spec(lambda _: 0, spec)), list(values.values()))

    return jax.jit(build, out_shardings=shardings(spec, mesh))(key)


def decay_mask(spec: Tree) -> Tree:
    """Return the tree of booleans that says which weights decay."""
    return map_spec(lambda param: param.decays, spec)


def tensor_shapes(spec: Tree) -> Mapping[str, tuple[int, ...]]:
    """Return {Hugging Face name: shape} of all tensors that the model has."""
    return {name: param.tensor_shape for param in leaves(spec).values() for name in param.tensors()}


def _draw(param: Param, key: jax.Array, dtype: Any, scale: float) -> jax.Array:
    if param.init == "normal":
        return (jax.random.normal(key, param.shape, jnp.float32) * scale).astype(dtype)
    return jnp.full(param.shape, 1.0 if param.init == "ones" else 0.0, dtype)

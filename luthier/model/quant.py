"""Quantised weights: types that stand where an array does, and are floats only inside the product that uses them.

A quantised weight is the matrix ``[..., out, in]`` of its Hugging Face tensor, the axes that are stacked leading, so
that its codes are those that bitsandbytes makes of the tensor (``codes``). What is quantised: the matrices of layers,
and the embedding of a model that has a head besides, which is looked up by rows. Heads, routers, norms and biases stay
floats.

Why not qwix's ``QArray``: its NF4 has one level of scales, with which an 8B model just misses 5.5 GB, quantises on the
device and by rules of its own, so that codes are not those of any released checkpoint, and is looked up by a gather;
and it brings Flax, of whose modules qwix replaces the functions, and which there is none of here.

Left out on purpose: products of integers (activations stay floats), and quantising anything that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.model import codes
from luthier.model.cpu import fence
from luthier.model.param import Param, Tree, map_spec

Array = Any

KINDS = ("int8", "int4", "nf4")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix ``[..., out, in]`` of int8 ``values`` with one fp32 scale for each row, ``[..., out]``.

    ``layout`` is the einops arrow from the matrix to the weight, whose slice has ``shape``; ``axes`` are the logical
    axes that its rows and columns begin with, and their sizes.
    """

    values: Array
    scales: Array
    layout: str = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    axes: tuple[tuple[str, int], ...] = field(metadata={"static": True})

    def matrix(self, dtype: Any) -> jax.Array:
        """Return the matrix ``[..., out, in]``, computed in fp32 and rounded once."""
        unit = self.scales * jnp.float32(1 / 127)
        return (self.values.astype(jnp.float32) * unit[..., None]).astype(dtype)

    def materialised(self, dtype: Any) -> jax.Array:
        """Return the weight as the model's array."""
        return _arranged(self, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blockwise:
    """A matrix ``[..., out, in]`` of four-bit codes, two in a byte, the first in the high half: ``[..., out, in / 2]``.

    ``scales`` ``[..., out, in / block]`` are fp32, or eight-bit codes where ``second`` ``[..., blocks / 256]`` holds
    scales of 256 of them each, in the order of the matrix, and ``offset`` ``[...]`` what is to be added.
    ``table`` names the sixteen values. ``layout``, ``shape`` and ``axes`` as in ``Int8``.
    """

    codes: Array
    scales: Array
    second: Array | None
    offset: Array | None
    table: str = field(metadata={"static": True})
    layout: str = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    axes: tuple[tuple[str, int], ...] = field(metadata={"static": True})

    def matrix(self, dtype: Any) -> jax.Array:
        """Return the matrix ``[..., out, in]``, computed in fp32 and rounded once."""
        lead, blocks = self.codes.shape[:-1], self.scales.shape[-1]
        pairs = self.codes.reshape(*lead, blocks, -1)
        values = _looked_up(self.table, jnp.stack([pairs >> 4, pairs & 15], -1))
        # Fenced, or the few scales are computed again for each of their values.
        scales = fence(self.block_scales())
        return (values * scales[..., None, None]).astype(dtype).reshape(*lead, -1)

    def materialised(self, dtype: Any) -> jax.Array:
        """Return the weight as the model's array."""
        return _arranged(self, dtype)

    def block_scales(self) -> jax.Array:
        """Return the fp32 scale of each block, ``[..., out, in / block]``."""
        if self.second is None or self.offset is None:
            return self.scales
        *lead, rows, blocks = self.scales.shape
        spread = jnp.broadcast_to(self.second[..., None], (*self.second.shape, codes.SECOND_BLOCK))
        spread = spread.reshape(*lead, -1)[..., : rows * blocks].reshape(self.scales.shape)
        values = jnp.asarray(codes.DYNAMIC).at[self.scales.astype(jnp.int32)].get(mode="promise_in_bounds")
        return values * spread + self.offset[..., None, None]


Quantised = Int8 | Blockwise


def is_quantised(weight: Any) -> bool:
    """Whether a weight is of one of this file's types."""
    return isinstance(weight, Int8 | Blockwise)


def kind(weight: Any) -> str:
    """Return which of ``KINDS`` a weight is, "" where it is an array."""
    if isinstance(weight, Int8):
        return "int8"
    return weight.table if isinstance(weight, Blockwise) else ""


def unnested(weight: Any) -> Any:
    """Return a weight whose fields can be cut by rows, columns and stacked axes alike; of no use but in parts.

    Scales of the second level belong to runs of blocks that cross rows, so they are worked in. Other weights are
    returned as they are.
    """
    if not isinstance(weight, Blockwise):
        return weight
    return replace(weight, scales=weight.block_scales(), second=None, offset=None)


def gathered(weight: Quantised) -> Quantised:
    """Return a weight as its product needs it on each device: split over `tensor` alone, if at all.

    The compiler would gather the floats that it is about to multiply, which are four or eight times as many bytes.
    """
    mesh = mesh_lib.current()
    if mesh is None or mesh.size == 1:
        return weight
    parts = weight.values if isinstance(weight, Int8) else weight.scales
    rows, columns = (_tensor(*axis, count, mesh) for axis, count in zip(weight.axes, parts.shape[-2:], strict=True))

    def placed(array: jax.Array, *over: str | None) -> jax.Array:
        lead = [None] * (array.ndim - len(over))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(*lead, *over)))

    if isinstance(weight, Int8):
        return replace(weight, values=placed(weight.values, rows, columns), scales=placed(weight.scales, rows))
    return replace(weight, codes=placed(weight.codes, rows, columns), scales=placed(weight.scales, rows, columns))


def rows(embedding: Any, ids: jax.Array, dtype: Any) -> jax.Array:
    """Return the rows ``ids`` of an embedding ``[V, D]``, an array or quantised."""
    if isinstance(embedding, Int8):
        part = replace(embedding, values=embedding.values[ids], scales=embedding.scales[ids])
        return part.matrix(dtype)
    return embedding[ids].astype(dtype)


def quantises(param: Param) -> bool:
    """Whether ``param`` is a matrix of layers that quantisation changes: routers are not, nor odd widths."""
    if "layer" not in param.axes or not param.decays or "router" in param.axes or len(param.sides) < 2:
        return False
    return _view(param).columns % 2 == 0


def plan(spec: Tree, quantization: str) -> Tree:
    """Return the tree of kinds, "" where a weight stays an array, of a model quantised as ``quantization``."""
    kinds = map_spec(lambda param: quantization if quantises(param) else "", spec)
    if quantization and "head" in spec:
        kinds = kinds | {"embed": "int8"}
    return kinds


def abstract(spec: Tree, quantization: str, dtype: Any, mesh: Mesh) -> Tree:
    """Return the tree of shapes, types and shardings; ``quantization`` "" gives ``param.abstract``'s.

    ``dtype`` is the type of what stays a float, or a function that returns it for a ``Param``. Rows and columns of a
    quantised weight lie on the mesh as the weight's own axes do; where that would cut blocks, rows are split in place
    of columns.
    """

    def shape(param: Param, kind: str) -> Any:
        if kind:
            return _abstract(param, kind, mesh)
        placed = mesh_lib.sharding(param.axes, param.shape, mesh)
        return jax.ShapeDtypeStruct(param.shape, _float_type(param, dtype), sharding=placed)

    return map_spec(shape, spec, plan(spec, quantization))


def shardings(spec: Tree, quantization: str, mesh: Mesh) -> Tree:
    """Return the tree of shardings of ``abstract``."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(spec, quantization, jnp.float32, mesh))


def quantised(param: Param, piece: np.ndarray, kind: str) -> Any:
    """Return one slice of a weight as ``kind`` on the host; "" returns it as it is."""
    if not kind:
        return piece
    view = _view(param)
    matrices = einops.rearrange(piece, view.from_weight, **view.sizes)
    make = _int8 if kind == "int8" else _blockwise(kind)
    stacked = [make(matrix) for matrix in matrices.reshape(-1, *matrices.shape[-2:])]
    lead = matrices.shape[:-2]
    fields = (np.stack(parts).reshape((*lead, *parts[0].shape)) for parts in zip(*stacked, strict=True))
    if kind == "int8":
        return Int8(*fields, layout=view.layout, shape=param.slice_shape, axes=view.axes)
    return Blockwise(*fields, table=kind, layout=view.layout, shape=param.slice_shape, axes=view.axes)


class _View(NamedTuple):
    """A slice of a weight as matrices: einops' arrows both ways, the names of the matrices' own axes, and the logical
    axes that these begin with, with their sizes.
    """

    layout: str
    from_weight: str
    sizes: dict[str, int]
    lead: tuple[str, ...]
    out: tuple[str, ...]
    into: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]

    @property
    def rows(self) -> int:
        return math.prod(self.sizes[name] for name in self.out)

    @property
    def columns(self) -> int:
        return math.prod(self.sizes[name] for name in self.into)


def _view(param: Param) -> _View:
    if len(param.sides) == 2:
        lead, (out, into) = (), param.sides
    else:  # one tensor of all experts, input first
        lead, into, out = param.sides
    matrix = " ".join([*lead, f"({' '.join(out)})", f"({' '.join(into)})"])
    weight = " ".join(param.names)
    sizes = dict(zip(param.names, param.slice_shape, strict=True))
    axes = dict(zip(param.names, param.slice_axes, strict=True))
    first = tuple((axes[side[0]], sizes[side[0]]) for side in (out, into))
    return _View(f"... {matrix} -> ... {weight}", f"{weight} -> {matrix}", sizes, lead, out, into, first)


def _abstract(param: Param, kind: str, mesh: Mesh) -> Any:
    view, spec = _view(param), mesh_lib.partition(param.axes, param.shape, mesh)
    stack = len(param.stack)
    over = dict(zip(param.names, spec[stack:], strict=True))
    lead = (*param.shape[:stack], *(view.sizes[name] for name in view.lead))
    lead_over = (*spec[:stack], *(over[name] for name in view.lead))
    # The first name of a side is its slowest axis, and no other of a side is ever split.
    out_over, in_over = _names(over[view.out[0]]), _names(over[view.into[0]])
    blocks = view.columns // codes.block_size(view.columns)
    if kind != "int8" and blocks % _ways(in_over, mesh):
        out_over, in_over = (*out_over, *in_over), ()
        if view.rows % _ways(out_over, mesh):
            out_over = _names(over[view.out[0]])

    def array(sizes: tuple[int, ...], dtype: Any, *places: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *sizes), dtype, sharding=NamedSharding(mesh, P(*lead_over, *places)))

    if kind == "int8":
        values = array((view.rows, view.columns), jnp.int8, out_over, in_over)
        return Int8(values, array((view.rows,), jnp.float32, out_over), view.layout, param.slice_shape, view.axes)
    return Blockwise(
        array((view.rows, view.columns // 2), jnp.uint8, out_over, in_over),
        array((view.rows, blocks), jnp.uint8, out_over, in_over),
        array((-(-view.rows * blocks // codes.SECOND_BLOCK),), jnp.float32, None),
        array((), jnp.float32),
        kind,
        view.layout,
        param.slice_shape,
        view.axes,
    )


def _names(over: Any) -> tuple[str, ...]:
    """Return the mesh axes of an entry of a partition, which is one, some, or None."""
    return (over,) if isinstance(over, str) else over or ()


def _ways(over: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in over)


def _tensor(axis: str, size: int, parts: int, mesh: Mesh) -> str | None:
    """Return "tensor" where that axis of the mesh splits the logical one, and the ``parts`` that are to stay whole."""
    splits = "tensor" in _names(mesh_lib.partition([axis], [size], mesh)[0])
    return "tensor" if splits and parts % mesh.shape["tensor"] == 0 else None


def _int8(matrix: np.ndarray) -> tuple[np.ndarray, ...]:
    return codes.int8(matrix)


def _blockwise(table: str) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    def make(matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        packed, scales = codes.four_bits(matrix, table)
        scales, second, offset = codes.second_level(scales)
        return packed, scales, second, np.asarray(offset)

    return make


def _float_type(param: Param, dtype: Any) -> Any:
    if callable(dtype) and not isinstance(dtype, type):
        return dtype(param)
    return param.dtype(dtype)


def _looked_up(table: str, numbers: jax.Array) -> jax.Array:
    """Return the values of four-bit numbers. Four rounds of choices take a third of a gather's time on a CPU."""
    if table == "int4":
        return (numbers.astype(jnp.float32) - 8) * jnp.float32(1 / 7)
    values = [jnp.float32(value) for value in codes.TABLES[table]]
    for bit in range(4):
        odd = (numbers >> bit) & 1 != 0
        values = [jnp.where(odd, *pair[::-1]) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _arranged(weight: Quantised, dtype: Any) -> jax.Array:
    names = weight.layout.rpartition("->")[2].split()[1:]
    return einops.rearrange(weight.matrix(dtype), weight.layout, **dict(zip(names, weight.shape, strict=True)))

"""Devices become a mesh; logical axes become mesh axes, in one table.

Arrays name their dimensions by what they are ("embed", "heads"); only this file knows which of the mesh's axes, if
any, a dimension is split over.

The devices of a slice (a TPU's, or a host's) speak to each other over a fast network and to those of other slices over
a slow one. Each axis has a size within a slice (``ici_*_parallelism``) and one over slices (``dcn_*_parallelism``).

Left out on purpose: per-model sharding rules. A model that needs one gets a new logical axis.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.config import ModelKeys
from luthier.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis -> mesh axes. A dimension in WHOLE is kept whole where the mesh axis does not divide it. "time" is that
# of rows in the order of `model.zigzag`, "slots" that of a cache and of whole rows; weights are split over `context` as
# over `fsdp`.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": ("context",),
    "slots": (),
    "layer": (),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "latent": ("fsdp", "expert", "context"),
    "router": (),
    "expert": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "expert_mlp": ("tensor",),
    "rank": (),
    "rows": (),
}
WHOLE = frozenset({"batch", "kv_heads", "latent", "vocab"})

_current: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def make(keys: ModelKeys, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh that the ``ici_*`` and ``dcn_*_parallelism`` keys describe over ``devices`` (default: all).

    Slices are told by the devices' ``slice_index``; where they have none and a ``dcn_*`` key is not 1, each process has
    one. ``devices`` may be those of a topology that is not there, to compile for. Raises UserError where the axes'
    product is not the number of devices in a slice, or of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = _slices(devices, [getattr(keys, name) for name in _names("dcn")])
    if len({len(members) for members in slices}) > 1:
        raise UserError(
            f"dcn_*_parallelism: slices of {', '.join(str(len(members)) for members in slices)} devices are here, and "
            "a mesh takes slices of one size. Start as many processes on each, with as many devices."
        )
    outer = _shape(keys, "dcn", len(slices), "slices")
    inner = _shape(keys, "ici", len(slices[0]), "devices in a slice" if len(slices) > 1 else "devices")
    place = functools.partial(mesh_utils.create_device_mesh, inner, devices)
    if len(slices) > 1:
        by_process = _slice_attribute(devices) == "process_index"
        place = functools.partial(
            mesh_utils.create_hybrid_device_mesh, inner, outer, devices, process_is_granule=by_process
        )
    try:  # neighbours on an axis are neighbours on the network
        placed = place()
    except NotImplementedError:  # no axis of the torus, nor some of them together, are as long as one of ours
        placed = place(allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _names(network: str) -> list[str]:
    return [f"{network}_{axis}_parallelism" for axis in AXES]


def _slices(devices: list[Any], over_slices: list[int]) -> list[list[Any]]:
    """Return the devices of each slice."""
    attribute = _slice_attribute(devices)
    members: dict[int, list[Any]] = {}
    for device in devices:
        members.setdefault(getattr(device, attribute), []).append(device)
    slices = [members[number] for number in sorted(members)]
    if any(size != 1 for size in over_slices):
        return slices
    if attribute == "slice_index" and devices[0].platform == "tpu" and len(slices) > 1:
        raise UserError(
            f"{len(slices)} slices are here, and all dcn_*_parallelism are 1. Set dcn_data_parallelism={len(slices)} "
            "for a copy of the weights on each, or "
            f"dcn_fsdp_parallelism={len(slices)} to split them between slices too."
        )
    return [devices]


def _slice_attribute(devices: list[Any]) -> str:
    return "process_index" if getattr(devices[0], "slice_index", None) is None else "slice_index"


def _shape(keys: ModelKeys, network: str, count: int, what: str) -> tuple[int, ...]:
    """Return the sizes of the axes over ``count`` of what a network joins."""
    names = _names(network)
    sizes = [getattr(keys, name) for name in names]
    fixed = math.prod(size for size in sizes if size != -1)
    if count % fixed or (-1 not in sizes and fixed != count):
        wanted = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
        raise UserError(
            f"{wanted}: {fixed} {what} asked for, {count} are here. "
            f"Choose axes whose product is {count}, or leave one at -1 for the rest."
        )
    return tuple(count // fixed if size == -1 else size for size in sizes)


def batch_shards(mesh: Mesh) -> int:
    """Return over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Make ``mesh`` the one that sharding constraints and kernels refer to while tracing."""
    token = _current.set(mesh)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _current.reset(token)


def current() -> Mesh | None:
    """Return the mesh in use, or None outside ``use``."""
    return _current.get()


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": the kind of the devices that are compiled for."""
    mesh = current()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def partition(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> P:
    """Return how an array with these logical axes is split over the mesh.

    Raises ValueError where two dimensions would take the same mesh axis, and UserError where an axis does not divide a
    dimension that must be split.
    """
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        over = tuple(name for name in RULES[axis] if mesh.shape[name] > 1)
        ways = math.prod(mesh.shape[name] for name in over)
        if size % ways and axis in WHOLE:
            over = ()
        elif size % ways:
            sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in over)
            keys = ", ".join(f"{network}_{name}_parallelism" for name in over for network in ("ici", "dcn"))
            raise UserError(
                f"the mesh's {sizes} does not divide the {size} of axis `{axis}`. "
                f"Choose {keys} whose product is a divisor of {size}."
            )
        entries.append(over or None)
    taken = [name for entry in entries for name in entry or ()]
    if len(taken) != len(set(taken)):
        raise ValueError(f"axes {tuple(axes)} take a mesh axis twice: {entries}")
    return P(*entries)


def sharding(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return ``partition`` as a sharding of ``mesh``."""
    return NamedSharding(mesh, partition(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pin the layout of an activation by its logical axes; nothing to do outside ``use`` or on one device."""
    mesh = current()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(axes, x.shape, mesh))

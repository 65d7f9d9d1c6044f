"""Devices become a mesh; logical axes become mesh axes, in one table.

Arrays name their dimensions by what they are ("embed", "heads"); only this file knows which of the mesh's axes, if
any, a dimension is split over.

Left out on purpose: per-model sharding rules. A model that needs one gets a new logical axis.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.config import ModelKeys
from luthier.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis -> mesh axes. A dimension in WHOLE is kept whole where the mesh axis does not divide it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": (),
    "layer": (),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "latent": ("fsdp", "expert"),
    "router": (),
    "expert": ("expert",),
    "expert_embed": ("fsdp",),
    "expert_mlp": ("tensor",),
    "rank": (),
    "rows": (),
}
WHOLE = frozenset({"batch", "kv_heads", "latent", "vocab"})

_current: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def make(keys: ModelKeys, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh that the ``ici_*_parallelism`` keys describe over ``devices`` (default: all).

    Raises UserError where the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    names = [f"ici_{axis}_parallelism" for axis in AXES]
    sizes = [getattr(keys, name) for name in names]
    fixed = math.prod(size for size in sizes if size != -1)
    wanted = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(
            f"{wanted}: {fixed} devices asked for, {len(devices)} are here. "
            f"Choose axes whose product is {len(devices)}, or leave one at -1 for the rest."
        )
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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
            keys = " x ".join(f"ici_{name}_parallelism={mesh.shape[name]}" for name in over)
            raise UserError(f"{keys} does not divide the {size} of axis `{axis}`. Choose a divisor of {size}.")
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

"""What each axis of the mesh should make devices send in a train step, from shapes alone.

Weights that are split for memory are gathered where they are used, once forward and once for each way that the
backward pass uses them; gradients of what every device has a part of are added up and cut; what a ``tensor`` axis
computes in parts is added up, and rows that stand on one device while the embedding's columns stand on another are
exchanged. A compiled program that sends more does something that nobody asked for; a test holds it against this.

Left out on purpose: losses and norms, a few numbers; the keys and values that a ``context`` axis exchanges, and the
tokens that experts do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier.model import param, quant
from luthier.model.param import Param
from luthier.train.job import Job

LEAST = {"none": 1, "dots": 1, "full": 2}
"""How often the backward pass at least uses a layer's weights: for gradients, and to compute the layer again."""


@dataclass(frozen=True)
class Sent:
    """``bytes`` that each device sends over ``axes`` in a step, and for ``what``."""

    what: str
    axes: tuple[str, ...]
    bytes: float


def expected(job: Job[Any], length: int, micro_batches: int = 1) -> list[Sent]:
    """Return what a train step of so many micro-batches, of rows of ``length`` tokens, should send."""
    mesh = job.mesh
    found = [*_weights(job), *_gradients(job), *_activations(job, length)]
    return [
        Sent(each.what, each.axes, each.bytes * micro_batches)
        for each in found
        if each.bytes and math.prod(mesh.shape[axis] for axis in each.axes) > 1
    ]


def _weights(job: Job[Any]) -> Iterator[Sent]:
    """Yield the gathering of what is multiplied with: forward, and backward twice, or with all computed again thrice.

    Twice, since a weight can be wanted in one layout to compute a layer again and in another for its gradient.
    """
    itemsize = jnp.dtype(job.compute.dtype).itemsize
    kinds = quant.plan(job.model.spec, job.tuning.quantization)
    for path, weight in param.leaves(job.model.spec).items():
        if len(weight.slice_shape) < 2 or _only_looked_up(job, path):
            continue
        axes, whole, _ = _split(weight, job.mesh)
        uses = 1 if path in ("embed", "head") else 1 + LEAST[job.compute.remat]
        size = {"": itemsize, "int8": 1.0}.get(_at(kinds, path), 0.57)
        yield Sent("weights", axes, uses * _gathered(whole * size, axes, job.mesh))


def _gradients(job: Job[Any]) -> Iterator[Sent]:
    """Yield the adding up, in fp32, of the gradients of what is trained.

    That of an embedding which is only looked up is each device's own: what it is made of was exchanged.
    """
    mesh = job.mesh
    for path, weight in param.leaves(job.tuning.spec).items():
        axes, whole, own = _split(weight, mesh)
        if not _only_looked_up(job, path):
            yield Sent("gradients", axes, _gathered(4.0 * whole, axes, mesh))
        others = tuple(
            axis for axis in (*mesh_lib.BATCH_AXES, "context") if mesh.shape.get(axis, 1) > 1 and axis not in own
        )
        yield Sent("gradients", others, 2 * _gathered(4.0 * whole / _ways(axes, mesh), others, mesh))


def _activations(job: Job[Any], length: int) -> Iterator[Sent]:
    """Yield what a ``tensor`` axis adds up, and what the embedding exchanges."""
    config, mesh = job.model.config, job.mesh
    tokens = job.config.per_device_batch_size * length / mesh.shape["context"]
    stream = tokens * config.hidden_size * jnp.dtype(job.compute.stream).itemsize
    passes = 2 + (job.compute.remat == "full")  # forward, backward, and forward again
    sums = 2 * len(config.layers) * passes
    tensor = ("tensor",)
    head = tokens * config.hidden_size * 4.0  # the gradient of what goes into the head is fp32
    yield Sent("activations", tensor, 2 * _gathered(sums * stream + 2 * head, tensor, mesh))
    axes, _, _ = _split(param.leaves(job.model.spec)["embed"], mesh)
    yield Sent("embeddings", axes, 3 * _gathered(tokens * config.hidden_size * 4.0, axes, mesh))


def _only_looked_up(job: Job[Any], path: str) -> bool:
    return path == "embed" and "head" in job.model.spec


def _split(weight: Param, mesh: Mesh) -> tuple[tuple[str, ...], float, tuple[str, ...]]:
    """Return the axes over which a weight is split for memory alone, its numbers between them, and all its axes.

    Those are the batch's axes and ``context``, but for the ``expert`` axis where it splits experts: it computes so.
    """
    over = mesh_lib.partition(weight.axes, weight.shape, mesh)
    memory: list[str] = []
    own: list[str] = []
    kept = math.prod(weight.shape)
    for logical, names in zip(weight.axes, over, strict=True):
        for name in (names,) if isinstance(names, str) else names or ():
            own.append(name)
            if name == "tensor" or logical == "expert":
                kept /= mesh.shape[name]
            else:
                memory.append(name)
    ordered = tuple(axis for axis in mesh.axis_names if axis in memory)
    return ordered, float(kept), tuple(own)


def _gathered(size: float, axes: tuple[str, ...], mesh: Mesh) -> float:
    """Return what a device sends where ``size`` bytes are gathered, or added up and cut, over ``axes``."""
    ways = _ways(axes, mesh)
    return size * (ways - 1) / ways


def _ways(axes: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree

"""A train step reckoned from shapes, where no compiler for the machine is at hand.

Memory as ``train.memory`` estimates it before a run, traffic as ``expected`` says it should be. Good to about a third.

Left out on purpose: programs that sample, whose bounds follow from the weights and the cache (``reinforced``).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from luthier.model import cost, param
from luthier.plan import expected, traffic
from luthier.plan.roofline import Work
from luthier.plan.stages import TEMPORARY, Held, Stage
from luthier.train import memory
from luthier.train.job import Job


def training(
    name: str,
    job: Job[Any],
    held: Held,
    flops: tuple[float, float],
    length: int,
    micro_batches: int,
    runs: float = 1.0,
) -> Stage:
    """Return the train step on rows of ``length`` tokens; ``flops`` are those of a device."""
    plan = memory.estimate(
        job.config, job.tuning, job.mesh, job.compute, row_length=length, accumulates=micro_batches > 1
    )
    known = {**held.arguments, **held.beside, **held.inside}
    whole = plan.total(job.config.per_device_batch_size) + sum(held.beside.values())
    parts = {**known, TEMPORARY: max(whole - sum(known.values()), 0.0)}
    found = expected.expected(job, length, micro_batches)
    between = traffic.over_slices(job.mesh)
    network = sum(each.bytes for each in found if not set(between).isdisjoint(each.axes))
    inside = sum(each.bytes for each in found) - network
    work = Work(*flops, _moved(job, held, length, micro_batches), inside, network)
    return Stage(name, parts, work, runs, reckoned=True)


def _moved(job: Job[Any], held: Held, length: int, micro_batches: int) -> float:
    """Return the bytes to and from memory: weights at each use, what is trained and its moments once, activations."""
    tokens = job.config.per_device_batch_size * length * micro_batches
    itemsize = jnp.dtype(job.compute.dtype).itemsize
    split = job.mesh.shape["tensor"] * job.mesh.shape["context"]
    activations = 2.0 * cost.saved_bytes(job.model.config, job.compute) * tokens / split
    uses = (1 + expected.LEAST[job.compute.remat]) * micro_batches
    weights = uses * param.count(job.model.spec) * itemsize / job.mesh.shape["tensor"]
    state = 2.0 * sum(held.arguments.values()) + held.inside["gradients"]
    return weights + state + activations

"""What `luthier sft` would run on a machine: its train step.

Left out on purpose: evaluation, whose program needs less of everything.
"""

from __future__ import annotations

import math

import jax

from luthier import mesh as mesh_lib
from luthier.algorithms.sft import sft
from luthier.config import SftConfig
from luthier.model import cost
from luthier.plan import abstract, estimated, flops, stages
from luthier.plan.report import Plan
from luthier.plan.stages import Held, Stage
from luthier.plan.topologies import Topology
from luthier.train import job as job_lib
from luthier.train.job import Job


def plan(config: SftConfig, machine: Topology, *, compiles: bool = True) -> Plan:
    """Return the plan of a run on ``machine``; by analysis alone unless it ``compiles``.

    Raises UserError where keys, mesh and model do not go together.
    """
    job = abstract.job(config, machine.devices(compiles=compiles))
    rows, length = job.batch_rows * config.gradient_accumulation_steps, config.max_target_length
    with mesh_lib.use(job.mesh):
        stage = _stage(job, machine, compiles=compiles and machine.compiles)
    return Plan("sft", config, job, machine, (stage,), tokens=rows * length)


def _stage(job: Job[SftConfig], machine: Topology, *, compiles: bool) -> Stage:
    config = job.config
    tokens = job.batch_rows * config.gradient_accumulation_steps * config.max_target_length
    work = flops.training(job, config.max_target_length, tokens / machine.chips)
    found = held(job, config.max_target_length, accumulates=config.gradient_accumulation_steps > 1)
    if not compiles:
        steps = config.gradient_accumulation_steps
        return estimated.training("train step", job, found, work, config.max_target_length, steps)
    traced = job_lib.trace_training(job, sft)
    return stages.compiled("train step", traced, found, work)


def held(job: Job, length: int, *, accumulates: bool) -> Held:
    """Return what a train step on rows of ``length`` tokens has in memory, by shapes alone."""
    state, trained = job.abstract_state, 0.0
    base = job.tuning.abstract_base(job.mesh)
    weights = {"trained weights": stages.held_bytes(state.params)}
    if base is not None:
        weights["other weights"] = stages.held_bytes(base)
    for leaf in jax.tree.leaves(state.params):
        trained += 4.0 * math.prod(leaf.sharding.shard_shape(leaf.shape))
    tokens = job.config.per_device_batch_size * length
    sizes = cost.saved_bytes(job.model.config, job.compute)
    split = job.mesh.shape["tensor"] * job.mesh.shape["context"]
    inside = {"gradients": trained * (2 if accumulates else 1), "activations": tokens * sizes / split}
    return Held({**weights, "optimizer": stages.held_bytes(state.opt_state)}, inside=inside)

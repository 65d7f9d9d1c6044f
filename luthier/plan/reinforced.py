"""What `luthier rl` would run on a machine: reading prompts, drawing tokens, and the programs of the policy step.

Everything is reckoned for completions that are all as long as they may be, behind prompts as long as they may be.

Left out on purpose: rewards, which are the host's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier.config import RlConfig
from luthier.data.groups import Layout
from luthier.memory import GIB
from luthier.model import lora, quant
from luthier.plan import abstract, estimated, flops, sampling, stages, supervised
from luthier.plan.report import Plan
from luthier.plan.sampling import Engine
from luthier.plan.stages import Held, Stage
from luthier.plan.topologies import Topology
from luthier.rollout.plan import Limits
from luthier.train import policy_step, rl_plan, rl_setup
from luthier.train.job import Job

SAMPLER, CACHE = "sampler's weights", "KV cache"


@dataclass(frozen=True)
class Run:
    """A job with the shapes of its policy step, and the engine that samples for it."""

    job: Job[RlConfig]
    machine: Topology
    layout: Layout
    engine: Engine
    compiles: bool

    @property
    def shares(self) -> bool:
        """Whether engine and trainer have the same devices."""
        return self.engine.mesh == self.job.mesh

    @property
    def completions(self) -> int:
        """The completions of a step."""
        return self.job.config.prompts_per_step * self.job.config.num_generations

    @property
    def micro_batches(self) -> int:
        """The micro-batches that a step's completions fill."""
        config, shapes = self.job.config, self.layout
        if shapes.shared:
            room = max(1, (shapes.row_length - config.max_prompt_length) // config.max_new_tokens)
        else:
            room = max(1, shapes.row_length // (config.max_prompt_length + config.max_new_tokens))
        rows = math.ceil(self.completions / min(room, shapes.sequences))
        return math.ceil(rows / shapes.rows)


def plan(config: RlConfig, machine: Topology, *, compiles: bool = True) -> Plan:
    """Return the plan of a run on ``machine``; by analysis alone unless it ``compiles``.

    Raises UserError where keys, mesh and model do not go together.
    """
    trains, samples = rl_plan.devices(config, machine.devices(compiles=compiles))
    job = abstract.job(config, trains)
    mesh = job.mesh if samples is trains else mesh_lib.make(config, samples)
    longest = config.max_prompt_length
    with mesh_lib.use(job.mesh):
        shapes = rl_setup.layout(config, job, longest, longest)
    with mesh_lib.use(mesh):
        engine = _engine(job, mesh, machine)
    run = Run(job, machine, shapes, engine, compiles and machine.compiles)
    found = (*sampled(run), *trained(run))
    tokens = run.completions * config.max_new_tokens
    return Plan("rl", config, job, machine, found, tokens=tokens)


def sampled(run: Run) -> list[Stage]:
    """Return the engine's programs. Beside them lies what the policy step keeps, where it has the same devices."""
    job, config, engine = run.job, run.job.config, run.engine
    beside = {}
    if run.shares:
        kept = supervised.held(job, run.layout.row_length, accumulates=True).arguments
        copied = engine.copies
        beside = kept if copied else {name: size for name, size in kept.items() if name != "trained weights"}
        beside = {name: size for name, size in beside.items() if name != "other weights"} | _reference(job)
    own = {SAMPLER if engine.copies else "weights": engine.weights_bytes, CACHE: engine.cache_bytes}
    with mesh_lib.use(engine.mesh):
        prefill = sampling.prefill(engine, Held(own, beside), config, compiles=run.compiles)
        decode = sampling.decode(engine, Held(own, beside), config, run.completions, compiles=run.compiles)
    return [prefill, decode]


def trained(run: Run) -> list[Stage]:
    """Return the programs of the policy step that take any time or memory."""
    job, config, shapes = run.job, run.job.config, run.layout
    held = supervised.held(job, shapes.row_length, accumulates=False)
    beside = _reference(job)
    if run.shares:
        beside |= {CACHE: run.engine.cache_bytes} | ({SAMPLER: run.engine.weights_bytes} if run.engine.copies else {})
    weights = {name: size for name, size in held.arguments.items() if name != "optimizer"}
    running = {"gradients": held.inside["gradients"]}
    optimizer = {"optimizer": held.arguments["optimizer"]}
    accumulate = Held({**weights, **running}, {**optimizer, **beside}, held.inside)
    passes, tokens = config.num_iterations * run.micro_batches, shapes.rows * shapes.row_length / job.mesh.size
    work = flops.training(job, shapes.row_length, tokens)
    if not run.compiles:
        return [estimated.training("policy step", job, accumulate, work, shapes.row_length, 1, runs=passes)]
    policy, asked = rl_setup.policy_of(job, rl_plan.objective(config, job.compute.dtype))
    with mesh_lib.use(job.mesh):
        traces = policy_step.traces(policy, job.optimizer, job.abstract_state, shapes, job.mesh, **asked)
        read = flops.forward(job.model.config, shapes.row_length) * tokens
        programs: dict[str, tuple[Held, tuple[float, float], float]] = {
            "score": (Held(weights, {**optimizer, **beside}), (read, read), run.micro_batches),
            "accumulate": (accumulate, work, passes),
            "apply": (Held({**held.arguments, **running}, beside), (0.0, 0.0), rl_plan.updates(config)),
        }
        names = {"score": "log-probs", "accumulate": "policy gradient", "apply": "update"}
        return [
            stages.compiled(names[name], traces[name](), own, work, runs)
            for name, (own, work, runs) in programs.items()
            if name in traces
        ]


def _reference(job: Job[RlConfig]) -> dict[str, float]:
    """Return what the reference policy takes: of a model all weights once more."""
    if not job.config.beta or job.tuning.adapter is not None:
        return {}
    return {"reference's weights": stages.held_bytes(job.abstract_state.params)}


def _engine(job: Job[RlConfig], mesh: Mesh, machine: Topology) -> Engine:
    """Return the engine as `luthier rl` makes it, for a whole step where memory allows."""
    config, model = job.config, job.model
    lines = {**model.cache_lines, **(model.routes_line if config.routing_replay else {})}
    kept = job.compute.cached(config.kv_cache_dtype)
    taken = sum(supervised.held(job, 1, accumulates=False).arguments.values()) if mesh == job.mesh else 0.0
    left = config.kv_cache_gib or max(machine.chip.memory - 1.5 * taken, 0.1 * machine.chip.memory) / GIB
    keys = config.model_copy(update={"kv_cache_gib": left})
    limits = Limits(keys, job.source.context_length, lines, kept, mesh)
    length = config.max_prompt_length + config.max_new_tokens
    size = limits.size(config.prompts_per_step * config.num_generations, min(length, limits.length or length))
    copies = mesh != job.mesh or (job.tuning.adapter is None and job.tuning.trained_dtype != job.compute.dtype)
    return Engine(job, mesh, lines, kept, size, _params(job, mesh), copies)


def _params(job: Job[RlConfig], mesh: Mesh) -> Any:
    """Return the shapes of the sampler's weights, and of an adapter's the trained ones with the base."""
    if job.tuning.adapter is None:
        return quant.abstract(job.model.spec, "", job.tuning.base_dtype, mesh)
    described = lora.spec(job.model.spec, job.tuning.adapter)
    return quant.abstract(described, "", jnp.float32, mesh), job.tuning.abstract_base(mesh)

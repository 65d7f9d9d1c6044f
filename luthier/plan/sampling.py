"""The engine's programs on a machine: prompts read into the cache, and a token drawn for every row of it.

A step of drawing reads the weights and what is cached, whatever it computes: that bounds it. The compiler's text does
not say how much of the cache is read, since that follows from the lengths; so it is reckoned, for rows that are on
average half way through their completion.

Left out on purpose: copies of a prompt's rows within its group, which take no time beside reading it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.config import RlConfig
from luthier.model import cache, lora
from luthier.model.cache import Cache, Lines
from luthier.plan import flops, stages
from luthier.plan.roofline import Work
from luthier.plan.stages import TEMPORARY, Held, Stage
from luthier.rollout import programs
from luthier.rollout.plan import Size
from luthier.rollout.sampling import Settings
from luthier.train.job import Job

STOPS = 8


@dataclass(frozen=True)
class Engine:
    """The engine of a ``job`` on ``mesh``: its cache's ``lines`` and ``size``, and the shapes of its weights.

    ``params`` are the weights, or with an adapter (what is trained, the base). ``copies`` says that the weights are
    not those that are trained but made from them.
    """

    job: Job[Any]
    mesh: Mesh
    lines: Lines
    dtype: Any
    size: Size
    params: Any
    copies: bool

    @property
    def weights_bytes(self) -> float:
        """What the weights take on each device."""
        return stages.held_bytes(self.params)

    @property
    def gathered_bytes(self) -> float:
        """What each device is sent of the weights of others, in each pass of a mesh that splits them for memory."""
        ways = math.prod(self.mesh.shape.get(axis, 1) for axis in ("fsdp", "expert", "context"))
        return self.weights_bytes * (ways - 1)

    @property
    def cache_bytes(self) -> float:
        """What the cache takes on each device."""
        return stages.held_bytes(self.cache)

    @functools.cached_property
    def cache(self) -> Cache:
        """The cache's shapes, types and shardings."""
        rows, length = self.size.stored, self.size.length
        with mesh_lib.use(self.mesh):
            found = jax.eval_shape(
                lambda: {name: line.empty(rows, length, self.dtype) for name, line in self.lines.items()}
            )
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=mesh_lib.sharding(cache.AXES, x.shape, self.mesh)
            ),
            found,
        )

    def weights(self, params: Any) -> Any:
        """Return the model's weights as the engine computes with them."""
        if self.job.tuning.adapter is None:
            return params
        return lora.settled(self.job.model.spec, self.job.tuning.weights(*params))


def prefill(engine: Engine, held: Held, config: RlConfig, *, compiles: bool) -> Stage:
    """Return the reading of prompts, of a chunk at a time."""
    chunk, longest = config.prefill_chunk_length, config.max_prompt_length
    length = min(chunk, max(16, 1 << (longest - 1).bit_length()))
    together = max(1, min(chunk // length, engine.size.rows))
    runs = math.ceil(config.prompts_per_step / together) * math.ceil(longest / length)
    work = flops.forward(engine.job.model.config, longest, head=False) * together * length / engine.mesh.size
    if not compiles:
        moved = engine.weights_bytes + 2 * engine.gathered_bytes + engine.cache_bytes * together / engine.size.stored
        parts = {**held.arguments, **held.beside}
        return Stage("prefill", parts, Work(work, work, moved, engine.gathered_bytes), runs, reckoned=True)
    array = functools.partial(_whole, engine.mesh)
    rows = (array(jnp.int32, together) for _ in range(4))
    arguments = (engine.params, engine.cache, array(jnp.int32, together, length), *rows)

    def read(params: Any, stored: Cache, *rest: Any) -> Cache:
        model, compute = engine.job.model, engine.job.compute
        return programs.prefill(engine.weights(params), stored, *rest, model=model, compute=compute)

    traced = jax.jit(read, donate_argnums=1).trace(*arguments)
    return stages.compiled("prefill", traced, held, (work, work), runs)


def decode(engine: Engine, held: Held, config: RlConfig, completions: int, *, compiles: bool) -> Stage:
    """Return the drawing of a token for each row of the cache; a step draws all tokens of all completions."""
    rows, length, half = engine.size.rows, engine.size.length, config.max_prompt_length + config.max_new_tokens / 2
    runs = config.max_new_tokens * math.ceil(completions / rows)
    work = flops.forward(engine.job.model.config, half) * rows / engine.mesh.size
    moved = (
        engine.weights_bytes
        + 2 * engine.gathered_bytes
        + sum(
            stages.held_bytes(engine.cache[name]) * rows / engine.size.stored * min(1.0, half / line.slots(length))
            for name, line in engine.lines.items()
        )
    )
    if not compiles:
        parts = {**held.arguments, **held.beside, TEMPORARY: 4.0 * rows * engine.job.model.config.vocab_size}
        return Stage("decode", parts, Work(work, work, moved, engine.gathered_bytes), runs, reckoned=True)
    traced = jax.jit(_drawing(engine, config), donate_argnums=1).trace(
        engine.params, engine.cache, _rows(engine, rows), _whole(engine.mesh, jnp.bool)
    )
    found = stages.compiled("decode", traced, held, (work, work), runs)
    if found.work is None:
        return found
    return replace(found, work=replace(found.work, memory=max(found.work.memory, moved)))


def _drawing(engine: Engine, config: RlConfig) -> Callable[..., Any]:
    def draw(params: Any, stored: Cache, rows: programs.Rows, impatient: jax.Array) -> Any:
        return programs.decode(
            engine.weights(params),
            stored,
            rows,
            impatient,
            model=engine.job.model,
            compute=engine.job.compute,
            steps=config.decode_steps,
            alternatives=0,
        )

    return draw


def _rows(engine: Engine, count: int) -> programs.Rows:
    array = functools.partial(_whole, engine.mesh)
    ints, floats = (lambda: array(jnp.int32, count)), (lambda: array(jnp.float32, count))
    settings = Settings(floats(), ints(), floats(), floats(), array(jnp.uint32, count, 2))
    live = array(jnp.bool, count)
    return programs.Rows(ints(), ints(), ints(), ints(), live, array(jnp.int32, count, STOPS), ints(), settings)


def _whole(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

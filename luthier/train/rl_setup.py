"""What `luthier rl` puts together before its loop: prompts, shapes, programs, the engine, the sampler.

Left out on purpose: what follows from keys alone (``rl_plan``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from luthier import mesh as mesh_lib
from luthier.config import RlConfig
from luthier.data import chat, source
from luthier.data.groups import Layout
from luthier.data.rows import Rows
from luthier.errors import UserError
from luthier.memory import GIB, available
from luthier.model import param
from luthier.model.param import Tree
from luthier.rollout import environment, opened, prompts
from luthier.rollout.engine import Sampling, SteppedEngine
from luthier.rollout.environment import Edge, Environment
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import Described
from luthier.rollout.workers import Scorers
from luthier.train import display, memory, policy_step
from luthier.train.balance import Balance
from luthier.train.job import Job
from luthier.train.policy_step import Policy, Programs
from luthier.train.rl_plan import Objective
from luthier.train.sampler import Sampler
from luthier.train.tasks import Tasks
from luthier.train.tuning import Base

ROW_LENGTH = 1024
"""Tokens of a packed row to aim at: each micro-batch adds up a whole gradient, but attention looks at whole rows."""
MOST_ROW_LENGTH = 2048
"""The most, where no single completion needs more; a longer group is cut in pieces."""


@dataclass(frozen=True)
class Game:
    """How completions are drawn, and what makes the environment that answers them, if there is one.

    ``length`` is the most tokens of a prompt and its completion together, None for any.
    """

    tokenizer: Any
    sampling: Sampling
    make_environment: Callable[[], Environment] | None
    length: int | None


def game(config: RlConfig, job: Job[RlConfig], tokenizer: Any) -> Game:
    """Return what is played. Raises UserError for an environment that is none."""
    model = Described(job.source, job.model, tokenizer)
    sampling, length = opened.sampling(config, model), config.max_target_length or model.context_length
    edge = Edge(tokenizer, chat.prompt_rendering(config, tokenizer), sampling.stop_token_ids)
    if not config.environment:
        return Game(tokenizer, sampling, None, length)
    make = environment.load(config.environment, config.environment_kwargs, edge)
    return Game(tokenizer, sampling, make, length)


def tasks(config: RlConfig, played: Game, console: Console) -> tuple[Tasks, Tasks | None]:
    """Return the prompts to train on and the held-out ones. Raises UserError for rows that ask nothing."""
    train, held_out = source.open_rows(config)
    trained = _tasks(config, train, played, console, shuffle=config.enable_data_shuffling)
    return trained, None if held_out is None else _tasks(config, held_out, played, console, shuffle=False)


def layout(config: RlConfig, job: Job[RlConfig], longest: int, shortest: int) -> Layout:
    """Return the shapes of the policy step: rows for one group or several, where that is not too long.

    Prompts have ``shortest`` to ``longest`` tokens.

    Raises UserError where ``row_length`` does not hold the longest prompt and its completion.
    """
    limit = config.max_new_tokens
    if config.row_length and config.row_length < longest + limit:
        raise UserError(
            f"row_length={config.row_length} does not hold the longest prompt ({longest} tokens) and max_new_tokens="
            f"{limit}: give at least {longest + limit}, or leave long prompts out by max_prompt_length."
        )
    group = longest + config.num_generations * limit
    # Whole groups, as many in each row, so that rows are full when all completions are as long as they can be.
    update = config.prompts_per_step // config.num_mini_batches
    rows = -(-update // max(1, ROW_LENGTH // group))
    together = -(-update // (-(-rows // job.batch_rows) * job.batch_rows))
    usual = max(longest + limit, min(MOST_ROW_LENGTH, together * group))
    row_length = config.row_length or -(-usual // 16) * 16
    own = config.num_generations * limit / (shortest + config.num_generations * limit)
    return Layout(
        rows=job.batch_rows,
        row_length=row_length,
        scored=math.ceil(row_length * own),  # no group has a greater share of tokens of its own
        # Twice as many as there are of the greatest length: most are shorter.
        sequences=2 * max(1, row_length // group) * config.num_generations,
        completion_length=limit,
        shared=job.model.shares_prompts(job.compute),
        routes=job.model.routes if config.routing_replay else None,
    )


def memory_settings(config: RlConfig, shapes: Layout) -> tuple[str, str]:
    """Return the settings that decide how much memory a step takes, and what to do about them."""
    return (
        f"per_device_batch_size={config.per_device_batch_size}, row_length={shapes.row_length}, "
        f"remat_policy={config.remat_policy}",
        "Lower row_length or per_device_batch_size, give the cache less (kv_cache_gib), or set remat_policy=full.",
    )


def plan_memory(job: Job[RlConfig], shapes: Layout) -> memory.Plan:
    """Return the bytes that the policy step takes. Raises UserError where they are more than there are."""
    config = job.config
    plan = memory.estimate(config, job.tuning, job.mesh, job.compute, row_length=shapes.row_length, accumulates=True)
    plan = replace(plan, fixed=plan.fixed + memory.sampling(config, job.tuning, job.mesh, job.compute))
    memory.check(config, plan, available(job.mesh), f"row_length={shapes.row_length}")
    return plan


def compile_steps(job: Job[RlConfig], objective: Objective, shapes: Layout, background: ThreadPoolExecutor) -> Programs:
    """Start compiling the programs of the policy step."""
    policy, words = policy_of(job, objective)
    return policy_step.compile_steps(policy, job.optimizer, job.abstract_state, shapes, job.mesh, background, **words)


def policy_of(job: Job[RlConfig], objective: Objective) -> tuple[Policy, dict[str, Any]]:
    """Return the policy that is trained, and what its programs are asked for besides: see ``policy_step.traces``."""
    policy = Policy(
        job.model,
        objective.loss,
        job.compute,
        temperature=job.config.temperature,
        entropy=objective.entropy,
        own_old=objective.old == "trainer",
        balance=Balance.of(job.config),
        weights=job.tuning.weights,
    )
    asked = {
        "reference": job.config.beta > 0,
        "old": objective.old != "current",
        "scores": objective.old == "trainer" or job.config.beta > 0,
        "base": job.tuning.abstract_base(job.mesh),
    }
    return policy, asked


def weights(job: Job[RlConfig], base: Base | None, mesh: Mesh) -> Callable[[Tree], Tree]:
    """Return what makes the sampler's weights, on its own mesh, of what is trained; the base is copied there once."""
    if mesh == job.mesh:
        return lambda trained: job.tuning.weights(trained, base)
    there = jax.device_put(base, job.tuning.base_shardings(mesh))
    shardings = param.shardings(job.tuning.spec, mesh)

    def moved(trained: Tree) -> Tree:
        with mesh_lib.use(mesh):
            return job.tuning.weights(jax.device_put(trained, shardings), there)

    return moved


def engine(
    job: Job[RlConfig],
    weights: Tree,
    version: int,
    mesh: Mesh,
    plan: memory.Plan,
    trained: Tasks,
    held_out: Tasks | None,
    tokenizer: Any,
) -> LocalEngine:
    """Return the engine on ``mesh`` with these ``weights``, its cache made for a whole step, so that it never grows.

    Of what memory the policy step leaves, the cache takes what it needs. Raises UserError where nothing fits.
    """
    config, free = job.config, available(mesh)
    keys = config
    if config.kv_cache_gib is None and free is not None:
        left = free if config.max_staleness else free - plan.total(config.per_device_batch_size)
        keys = config.model_copy(update={"kv_cache_gib": max(left, 0.1 * free) / GIB})
    with mesh_lib.use(mesh):
        found = LocalEngine(
            job.model,
            weights,
            job.compute,
            mesh,
            keys,
            tokenizer=tokenizer,
            context_length=job.source.context_length,
            seed=config.seed,
            version=version,
            record_routes=config.routing_replay,
        )
        longest = _longest(trained, held_out)
        length = longest + config.max_new_tokens
        sequences = config.prompts_per_step * config.num_generations
        found.reserve(sequences, min(length, found.limits.length or length))
        found.warm_up(longest=length if config.environment else longest)
    return found


def length(config: RlConfig, played: Game, trained: Tasks, held_out: Tasks | None) -> int:
    """Return the most tokens that a prompt and its completion can have."""
    found = _longest(trained, held_out) + config.max_new_tokens
    return found if played.length is None else min(found, played.length)


def sampler(
    job: Job[RlConfig],
    objective: Objective,
    played: Game,
    found: SteppedEngine,
    trained: Tasks,
    held_out: Tasks | None,
    scorers: Scorers,
    mesh: Mesh,
) -> Sampler:
    """Return what collects steps."""
    return Sampler(
        config=job.config,
        engine=found,
        tasks=trained,
        held_out=held_out,
        scorers=scorers,
        habits=objective.habits,
        sampling=played.sampling,
        make_environment=played.make_environment,
        tokenizer=played.tokenizer,
        mesh=mesh,
        alone=job.config.rollout_engine == "vllm" and job.config.max_staleness > 0,
    )


def _longest(trained: Tasks, held_out: Tasks | None) -> int:
    return max(each.longest for each in (trained, held_out) if each is not None)


def _tasks(config: RlConfig, rows: Rows, played: Game, console: Console, *, shuffle: bool) -> Tasks:
    chosen = prompts.choose(config, rows)
    asked = prompts.read(rows, chosen, config.system_prompt)
    ids = prompts.encode(config, asked, played.tokenizer)
    if played.make_environment is not None:
        ids = environment.openings(played.make_environment, asked, ids)
    limit = _prompt_limit(config, played.length)
    long = set() if limit is None else set(prompts.overlong(ids, limit))
    if long:
        display.warn(console, f"{len(long):,} of {len(ids):,} prompts have over {limit} tokens, and are left out.")
    kept = [index for index in range(len(ids)) if index not in long]
    if not kept:
        room = f"lower max_new_tokens={config.max_new_tokens}, which share {played.length} tokens with the prompt"
        remedy = "raise max_prompt_length" if limit == config.max_prompt_length else room
        raise UserError(f"{rows.source}: no prompt of at most {limit} tokens: {remedy}.")
    return Tasks([asked[index] for index in kept], [ids[index] for index in kept], config.seed, shuffle)


def _prompt_limit(config: RlConfig, length: int | None) -> int | None:
    """Return how many tokens a prompt may have, so that there is room for its completion within ``length``."""
    if length is not None and config.max_new_tokens >= length:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the {length} tokens that the model "
            "was made for: lower it."
        )
    limits = [config.max_prompt_length or None, None if length is None else length - config.max_new_tokens]
    return min((limit for limit in limits if limit is not None), default=None)

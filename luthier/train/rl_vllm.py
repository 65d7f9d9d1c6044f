"""vLLM's side of `luthier rl`: its servers, what they are sent, and the engine over them.

Left out on purpose: the embedded engine (``rl_setup``), and when weights are sent (``feed_apart``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from luthier import processes
from luthier.config import RlConfig
from luthier.model.param import Tree
from luthier.rollout.vllm import adapters, named, opening
from luthier.rollout.vllm.client import Pause
from luthier.rollout.vllm.devices import Share
from luthier.rollout.vllm.engine import VllmEngine
from luthier.rollout.vllm.opening import Side
from luthier.rollout.vllm.probe import Needed
from luthier.rollout.vllm.sending import Adapted, Send, Whole
from luthier.train.job import Job
from luthier.train.tuning import Base

LOGS = "vllm"
"""The folder of a run that has the servers' logs."""


def claim(config: RlConfig) -> Sequence[Share]:
    """Return the devices of each server that is started here, which JAX then does not see; none for another engine.

    To be called before JAX has any devices. Raises UserError where vLLM or devices are missing.
    """
    return opening.claim(config) if config.rollout_engine == "vllm" else ()


def check(job: Job[RlConfig]) -> None:
    """Raise UserError for an adapter that vLLM cannot serve."""
    if job.config.rollout_engine == "vllm" and job.tuning.adapter is not None:
        adapters.check(job.model.spec, job.tuning.adapter)


@contextlib.contextmanager
def side(
    job: Job[RlConfig], tokenizer: Any, length: int, shares: Sequence[Share], console: Console, place: Path
) -> Iterator[Side | None]:
    """Begin to start servers, or look at those elsewhere, and end what was started; None for another engine.

    ``length`` is the most tokens of prompt and completion. Raises UserError for servers that are not what they have to
    be.
    """
    config, adapter = job.config, job.tuning.adapter
    if config.rollout_engine != "vllm":
        yield None
        return
    needed = Needed(length, adapters.room(adapter) or 0 if adapter is not None else 0)
    found = processes.by_first(
        lambda: opening.side(
            config,
            job.source,
            tokenizer,
            shares,
            needed,
            computed=jnp.dtype(job.compute.dtype).name,
            say=partial(console.print, markup=False),
            logs=place / LOGS,
        )
    )
    try:
        yield found
    finally:
        found.servers.close()


def engine(
    job: Job[RlConfig],
    found: Side,
    base: Base | None,
    trained: Tree,
    version: int,
    tokenizer: Any,
    length: int,
    console: Console,
) -> VllmEngine:
    """Return the engine over these servers, which are sent what is ``trained``: now, and by ``sync``.

    Raises RunError where they do not come, or do not take it.
    """
    config = job.config
    return VllmEngine(
        found.servers,
        _send(job, base, found.dtype),
        trained,
        vocab_size=job.model.config.vocab_size,
        tokenizer=tokenizer,
        length=length,
        seed=config.seed,
        version=version,
        timeout=config.vllm_timeout,
        wait=config.vllm_wait,
        interval=config.weight_sync_interval,
        in_turn=not config.max_staleness,
        say=partial(console.print, markup=False),
    )


def _send(job: Job[RlConfig], base: Base | None, dtype: str) -> Send:
    """Return what brings what is trained to servers: all weights, or the base once and then the adapter."""
    config, tuning = job.config, job.tuning
    tensors = named.full(job.model.spec, dtype)
    mode: Pause = "keep" if config.interrupted_completions == "keep" else "abort"
    if base is None or tuning.adapter is None:
        return Whole(tensors, pause_mode=mode, timeout=config.vllm_timeout)
    written = adapters.files(tuning.spec, tuning.adapter, job.source)
    return Adapted(
        lambda _: tensors(base.params),
        lambda trained: written(trained, base.begun),
        pause_mode=mode,
        timeout=config.vllm_timeout,
    )

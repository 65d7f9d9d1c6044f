"""vLLM's servers from the keys: those that are started here, or those that are there already.

Left out on purpose: what they are sent (``sending``), and asking them (``engine``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from luthier.checkpoint.source import Source
from luthier.config import EvalConfig, GenerateConfig, RlConfig
from luthier.config.vllm import arguments
from luthier.errors import UserError
from luthier.rollout.vllm import command, devices, probe
from luthier.rollout.vllm.command import Wanted
from luthier.rollout.vllm.devices import Share
from luthier.rollout.vllm.fleet import Elsewhere, Servers
from luthier.rollout.vllm.probe import Needed
from luthier.rollout.vllm.servers import KEY_VARIABLE, Children

Config = GenerateConfig | EvalConfig | RlConfig
Say = Callable[[str], None]


def claim(keys: Config) -> Sequence[Share]:
    """Return the devices of each server that is started here; JAX has the others. To be called before it has any.

    A command that does not train computes nothing itself, so that JAX has the CPU. Raises UserError where vLLM is not
    installed, or there are not enough devices.
    """
    if not isinstance(keys, RlConfig):
        jax.config.update("jax_platforms", "cpu")
    if not keys.starts_servers:
        return ()
    if jax.distributed.is_initialized():
        raise UserError(
            "rollout_engine=vllm: a run of several processes has servers of its own hosts: run them there (`luthier "
            "vllm`), and set vllm_urls=..."
        )
    command.find_python(keys)
    if not isinstance(keys, RlConfig):
        return devices.take(keys.vllm_servers, sampling=1.0, training=0.0, together=False)
    return devices.take(
        keys.vllm_servers,
        sampling=keys.sampler_devices_fraction,
        training=keys.trainer_devices_fraction,
        together=keys.max_staleness > 0,
    )


class Side(NamedTuple):
    """Servers, and the type that they compute in and are sent weights in."""

    servers: Servers
    dtype: str


def side(
    keys: Config,
    source: Source,
    words: Any,
    shares: Sequence[Share],
    needed: Needed,
    *,
    computed: str,
    say: Say,
    logs: Path | None = None,
) -> Side:
    """Start servers on ``shares``, or look at those elsewhere. It is for the first process alone.

    Those that are started compute in ``computed``, unless ``vllm_arguments`` say otherwise. Their logs are files in
    ``logs``, None for a folder that ends with them. Raises UserError where they cannot be had as ``needed``.
    """
    if keys.vllm_urls:
        api_key = os.environ.get(KEY_VARIABLE, "")
        kind = probe.check(keys.vllm_urls, needed, api_key=api_key, wait=keys.vllm_wait, say=say)
        return Side(Elsewhere(keys.vllm_urls, api_key), kind)
    wanted = Wanted(
        keys,
        command.dtype(computed, arguments(keys)),
        length=needed.length,
        lora_rank=needed.lora_rank,
        max_num_seqs=keys.max_num_seqs,
        kv_cache_gib=keys.kv_cache_gib,
    )
    return Side(Children(wanted, source, words, shares, logs), wanted.dtype)

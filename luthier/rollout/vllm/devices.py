"""Which devices of this host vLLM's servers have, and which are left to JAX.

Left out on purpose: TPUs, which one process has whole, and one GPU for both, where each would take the other's memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

from luthier.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = Path("/proc/driver/nvidia/gpus")


class Share(NamedTuple):
    """What one server has: GPUs as CUDA_VISIBLE_DEVICES names them, or of a host without them threads of the CPU."""

    gpus: tuple[str, ...] = ()
    threads: int = 1

    @property
    def environment(self) -> dict[str, str]:
        """The variables that keep a server to this."""
        if self.gpus:
            return {VISIBLE: ",".join(self.gpus)}
        # Several servers would each bind their threads to the same cores.
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self.threads)}


def gpus(environment: Mapping[str, str] = os.environ, driver: Path = _DRIVER) -> tuple[str, ...]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without touching them."""
    found = sorted(driver.iterdir()) if driver.is_dir() else []
    if VISIBLE not in environment:
        return tuple(str(number) for number in range(len(found)))
    named = [name.strip() for name in environment[VISIBLE].split(",")]
    return tuple(name for name in named if name and name != "-1") if found else ()


def whole() -> Share:
    """Return all devices of this host, for one server."""
    return Share(gpus(), _cores())


def usual_dtype(share: Share) -> str:
    """Return the type that a server computes in by default, as its trainers do."""
    return "bfloat16" if share.gpus else "float32"


def take(
    servers: int,
    sampling: float,
    training: float,
    *,
    together: bool,
    environment: MutableMapping[str, str] = os.environ,
    driver: Path = _DRIVER,
) -> list[Share]:
    """Return what each of the ``servers`` has, and leave JAX the GPUs that train.

    To be called before JAX looks for devices. ``sampling`` and ``training`` are the shares of both sides, ``together``
    whether they work at the same time: threads of a CPU are split then alone. Raises UserError where there are not
    enough GPUs.
    """
    here = gpus(environment, driver)
    if not here:
        return [Share(threads=max(1, int(_cores() * (sampling if together else 1)) // servers))] * servers
    trains, samples = int(training * len(here) + 1e-9), int(sampling * len(here) + 1e-9)
    each = samples // servers
    if training and not (each and trains):
        raise UserError(
            f"sampler_devices_fraction={sampling:g} and trainer_devices_fraction={training:g} of {len(here)} GPUs give "
            f"{samples} to vllm_servers={servers} and {trains} to the trainer, and each needs one of its own. Use more "
            "GPUs, other fractions, servers elsewhere (vllm_urls), or rollout_engine=local."
        )
    if not each:
        raise UserError(f"vllm_servers={servers}: there are {len(here)} GPUs, and each server needs one. Give fewer.")
    environment[VISIBLE] = ",".join(here[:trains]) if training else "-1"
    sampled = here[len(here) - samples :]
    return [Share(sampled[number * each : (number + 1) * each]) for number in range(servers)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

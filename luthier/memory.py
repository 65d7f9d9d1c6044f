"""How much memory there is: on the devices, and held by this process.

Left out on purpose: how much a run needs (``train.memory``, ``rollout.plan``).
"""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

import psutil
from jax.sharding import Mesh

from luthier import processes

GIB = 2**30
_GROUPS = Path("/sys/fs/cgroup")


def available(mesh: Mesh) -> float | None:
    """Return the bytes that each device can still give, or None where the platform does not say.

    All processes call it: what counts is the least that one of them has.
    """
    found = [free for free in processes.gather(_available(mesh)) if free is not None]
    return min(found, default=None)


def _available(mesh: Mesh) -> float | None:
    """Return what there is on this process's devices."""
    first, *others = mesh.local_devices
    if first.platform == "cpu":
        return min(psutil.virtual_memory().available, _container_limit()) / (1 + len(others))
    stats = first.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _container_limit(groups: Path = _GROUPS) -> float:
    """Return the bytes left to this process's control group (version 2, then 1); infinity outside one."""
    for folder, limit, used, cached in (
        (groups, "memory.max", "memory.current", "inactive_file"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).is_file() and (folder / used).is_file():
            text = (folder / limit).read_text().strip()
            if text == "max":
                return math.inf
            # The kernel counts the files it has cached as used, and drops them before it refuses memory.
            return float(text) - float((folder / used).read_text()) + _entry(folder / "memory.stat", cached)
    return math.inf


def _entry(stat: Path, name: str) -> float:
    """Return what the file ``stat`` says of ``name``, or 0 where it is not readable or says nothing."""
    lines = stat.read_text().splitlines() if os.access(stat, os.R_OK) else []
    return next((float(value) for key, value in map(str.split, lines) if key == name), 0.0)


def peak_resident() -> float:
    """Return the most bytes that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: the peak that getrusage gives there can be that of the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)

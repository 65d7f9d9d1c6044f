"""How much memory there is: on the devices, and held by this process.

Left out on purpose: how much a run needs (``train.memory``, ``rollout.plan``).
"""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import psutil
from jax.sharding import Mesh

GIB = 2**30


def available(mesh: Mesh) -> float | None:
    """Return the bytes that each device can still give, or None where the platform does not say."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return min(psutil.virtual_memory().available, _container_limit()) / mesh.size
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _container_limit() -> float:
    """Return the bytes left to this process's control group (version 2, then 1); infinity outside one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).is_file() and Path(used).is_file():
            text = Path(limit).read_text().strip()
            return math.inf if text == "max" else float(text) - float(Path(used).read_text())
    return math.inf


def peak_resident() -> float:
    """Return the most bytes that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: the peak that getrusage gives there can be that of the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)

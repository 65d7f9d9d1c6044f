"""How a model is computed, as against what it computes: settings that never change a result beyond rounding."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from luthier import mesh


@dataclass(frozen=True)
class Compute:
    """The type of activations, the attention kernel, what the backward pass recomputes, and how keys and values reach
    queries on other devices of the ``context`` axis.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    context: str = "all_gather"

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Return the context to trace in: fp32 stays fp32, not the shorter types that GPUs and TPUs multiply it in."""
        if self.dtype != jnp.float32 or mesh.platform() == "cpu":
            return contextlib.nullcontext()
        return jax.default_matmul_precision("highest")


def fast_dtype() -> Any:
    """Return bfloat16 where the devices in use multiply it fast, else float32.

    On CPUs that takes XLA's bf16 kernels of jax 0.12 and a processor with bf16 dot products; without either, bf16
    runs several times slower than fp32.
    """
    if mesh.platform() != "cpu":
        return jnp.bfloat16
    return jnp.bfloat16 if jax.__version_info__ >= (0, 12) and _cpu_has_bf16() else jnp.float32


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:  # not Linux
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16 "))

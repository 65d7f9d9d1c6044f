"""How a model is computed, as against what it computes: settings that never change a result beyond rounding.

Rounding matters where two programs are to agree, as sampler and trainer are. They round the same numbers at the same
places, but add them up in other orders, so that now and then one lands on the other side of a bf16 number's edge; after
a few layers the two are as far from each other as either is from fp32. What helps is to round less often:
``Compute.float32``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from luthier import mesh
from luthier.config import ModelKeys


@dataclass(frozen=True)
class Compute:
    """The type that weights are multiplied in, the attention kernel, what the backward pass recomputes, how keys and
    values reach queries on other devices of the ``context`` axis, and what is fp32 whatever the type.

    ``float32`` is "none", "residual" (the stream that layers add to, and what they add) or "attention" (that, all of
    attention, and what a dense feed-forward block's first products give; what goes into attention's own products is not
    rounded either). Gradients are computed in ``dtype`` all the same, and experts too.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    context: str = "all_gather"
    float32: str = "none"

    @property
    def stream(self) -> Any:
        """The type of the stream that layers add to."""
        return self.dtype if self.float32 == "none" else jnp.float32

    @property
    def attention_dtype(self) -> Any:
        """The type of what goes into attention, and through it."""
        return jnp.float32 if self.float32 == "attention" else self.dtype

    def cached(self, kv_cache_dtype: str) -> Any:
        """Return the type that ``kv_cache_dtype`` means."""
        return jnp.dtype(self.attention_dtype if kv_cache_dtype == "auto" else kv_cache_dtype)

    @property
    def inner(self) -> Any:
        """The type of what a feed-forward block's first products give."""
        return self.attention_dtype

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Return the context to trace in: fp32 stays fp32, not the shorter types that GPUs and TPUs multiply it in."""
        if self.attention_dtype != jnp.float32 or mesh.platform() == "cpu":
            return contextlib.nullcontext()
        return jax.default_matmul_precision("highest")

    @property
    def described(self) -> str:
        """The types, in words."""
        kept = {"none": "", "residual": "residual stream", "attention": "residual stream and attention"}[self.float32]
        name = jnp.dtype(self.dtype).name
        return f"{name} ({kept} in float32)" if kept and self.dtype != jnp.float32 else name


def chosen(keys: ModelKeys, *, remat: str = "none", scored: bool = False) -> Compute:
    """Return how ``keys`` want a model computed on the platform in use.

    ``scored`` says that a trainer scores what it sampled itself. Then ``float32_activations=auto`` is "attention" on a
    CPU, and "none" where the fast attention kernels are bf16's alone.
    """
    dtype = fast_dtype() if keys.dtype == "auto" else jnp.dtype(keys.dtype)
    float32 = keys.float32_activations
    if float32 == "auto":
        float32 = "attention" if scored and mesh.platform() == "cpu" else "none"
    return Compute(dtype, keys.attention, remat, keys.context_parallel_strategy, float32)


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

"""What XLA has to be told on a CPU, and must not be told elsewhere.

XLA's CPU compiler hands a matmul to its fast kernels only where the left operand's contracted dimension is the
innermost one in memory and the operands are whole arrays. Left to itself it folds transpositions into a matmul, which
then runs as a plain loop (20 times slower in bf16), and fuses element-wise chains into reads that cross memory.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from luthier import mesh


def transposed(x: jax.Array) -> jax.Array:
    """Return ``x`` with its last two axes exchanged, on a CPU also in memory.

    Over several devices it is but kept out of the matmul, which in bf16 would have no kernel at all: XLA does not split
    what has a layout of its own, and would gather it on each.
    """
    here = mesh.current()
    if _on_cpu() and (here is None or here.size == 1):
        return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))
    return fence(x.mT)


def fence(x: jax.Array) -> jax.Array:
    """Return ``x``, on a CPU kept out of fusions with what uses it."""
    return jax.lax.optimization_barrier(x) if _on_cpu() else x


def compiler_options() -> dict[str, str]:
    """Return the options that a train step is compiled with.

    XLA's CPU compiler would order a program for concurrency, which fills the memory of gradients with zeros before the
    forward pass: 0.2 GB more at SmolLM2's peak of 3 GB, and no sooner done.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if _on_cpu() else {}


def _on_cpu() -> bool:
    return mesh.platform() == "cpu"

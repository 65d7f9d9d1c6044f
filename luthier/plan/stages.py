"""A program of a run, compiled for a machine or reckoned from shapes: what it holds in memory and what work it is.

Left out on purpose: which programs a run has (``supervised``, ``reinforced``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from luthier.plan import bandwidth, hlo, roofline, traffic
from luthier.plan.roofline import Work
from luthier.plan.traffic import Collective
from luthier.train import memory

TEMPORARY = "temporary"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Stage:
    """A program of a run on each device.

    ``parts`` says by name what lies in memory while it runs, in bytes. ``runs`` is how often a step runs it, and
    ``work`` what one run is, None of a program that could not be compiled. ``collectives`` are those that it was found
    to have, ``kernels`` its hand-written kernels. ``reckoned`` says that nothing was compiled: all follows from shapes.
    """

    name: str
    parts: Mapping[str, float]
    work: Work | None
    runs: float = 1.0
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[str, ...] = ()
    reckoned: bool = False

    @property
    def needed(self) -> float:
        """The bytes in memory while it runs."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Held:
    """What is in memory while a program runs, by name: of its ``arguments``, and what lies ``beside`` it.

    ``inside`` is what it will make, as far as shapes say: gradients, and the activations that the backward pass finds.
    """

    arguments: Mapping[str, float]
    beside: Mapping[str, float] = field(default_factory=dict)
    inside: Mapping[str, float] = field(default_factory=dict)


def compiled(
    name: str,
    traced: jax.stages.Traced,
    held: Held,
    flops: tuple[float, float],
    runs: float = 1.0,
) -> Stage:
    """Return a program as the machine's compiler makes it; where it is too big, with what the compiler says it needs.

    ``flops`` are those of a device, with and without what is computed again. Raises what the compiler raises for any
    other reason.
    """
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = overflow(str(error))
        if needed is None:
            raise
        known = {**held.arguments, **held.beside, **held.inside}
        rest = max(needed + sum(held.beside.values()) - sum(known.values()), 0.0)
        return Stage(name, {**known, TEMPORARY: rest}, None, runs)
    text = program.as_text() or ""
    parsed, found = hlo.parse(text), traffic.collectives(text)
    inside, network = roofline.sent(found)
    work = Work(*flops, bandwidth.moved(parsed), inside, network)
    parts = _parts(memory.of_program(program) or 0.0, held)
    return Stage(name, parts, work, runs, tuple(found), kernels(parsed))


def _parts(total: float, held: Held) -> dict[str, float]:
    """Divide a program's memory between what is known of it and the rest.

    What the program makes is reckoned, and less where the compiler found a way to have less of it at once.
    """
    rest = max(total - sum(held.arguments.values()), 0.0)
    reckoned = sum(held.inside.values())
    share = min(1.0, rest / reckoned) if reckoned else 0.0
    inside = {name: share * size for name, size in held.inside.items()}
    return {**held.arguments, **held.beside, **inside, TEMPORARY: rest - sum(inside.values())}


def overflow(message: str) -> float | None:
    """Return the bytes that a program needs, where a compiler says that it does not fit; None for another failure."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        r"Total hbm usage >= ([\d.]+)([KMGT])",
        r"Used ([\d.]+)([KMGT]) of",
        r"\(([\d.]+)([KMGT])\) exceeds",
    ):
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * UNITS[found[2]]
    return None


def kernels(program: hlo.Program) -> tuple[str, ...]:
    """Return the names of the hand-written kernels of a program for a TPU."""
    calls = (each.name for _, each, _ in program.executed() if '"tpu_custom_call"' in each.attributes)
    return tuple(sorted({re.sub(r"[.\d]+$", "", name) for name in calls}))


def held_bytes(tree: Any) -> float:
    """Return the bytes that arrays described with their shardings take on each device."""
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )

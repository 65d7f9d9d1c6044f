"""What devices send each other while a compiled program runs: each collective, what it moves and how often.

Left out on purpose: what lies between the devices, of which ``topologies`` knows the speed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from luthier.plan import hlo
from luthier.plan.hlo import Computation, Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]*)\}x[^"]*",_xla_megascale_transfer_type="(\w+)"')


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    ``bytes`` is what each device sends when it runs once: of an array of n bytes over a group of g, ``n (g - 1) / g``
    where it is gathered, scattered or exchanged, and twice that where it is reduced and every device gets the sum.
    ``payload`` is the whole array. ``times`` is how often a run of the program does it, and ``scope`` where in the
    model. ``group`` is the first of the groups that it runs in, as positions in the mesh; of one between slices, which
    a TPU hands to its hosts, only the number of ``slices`` is known.
    """

    kind: str
    bytes: float
    group_size: int
    times: int
    payload: float = 0.0
    group: tuple[int, ...] = ()
    scope: str = ""
    slices: int = 1

    @property
    def total(self) -> float:
        """The bytes that each device sends over the whole run."""
        return self.bytes * self.times

    def axes(self, mesh: Mesh) -> tuple[str, ...]:
        """Return the axes of ``mesh`` that it runs over: those along which its group, or the slices, extend."""
        if self.slices > 1:
            return over_slices(mesh)
        places = np.array(np.unravel_index(np.array(self.group), mesh.devices.shape))
        return tuple(name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1)


def collectives(program: Any) -> list[Collective]:
    """Return the collectives of a compiled program, or of its text, in the order in which they run.

    Those of groups of one device are left out. Bodies of loops count as often as the loop turns, where the program says
    how often, else once.
    """
    parsed = hlo.parse(program if isinstance(program, str) else program.as_text())
    found = (each for run in parsed.executed() for each in _of(parsed, *run))
    return [each for each in found if each.group_size > 1]


def by_axes(found: Iterable[Collective], mesh: Mesh) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return {(kind, axes of the mesh): bytes that each device sends}."""
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for each in found:
        key = each.kind, each.axes(mesh)
        totals[key] = totals.get(key, 0.0) + each.total
    return totals


def over_slices(mesh: Mesh) -> tuple[str, ...]:
    """Return the axes along which a mesh's devices are of other slices."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0)(mesh.devices)
    return tuple(
        name for dimension, name in enumerate(mesh.axis_names) if (slices != np.take(slices, [0], axis=dimension)).any()
    )


def _of(program: Program, computation: Computation, instruction: Instruction, times: int) -> Iterator[Collective]:
    kind = instruction.op.removesuffix("-start")
    if kind in KINDS:
        yield _collective(program, computation, instruction, kind, times)
    elif instruction.op == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
        kind, slices = found[2].lower().replace("_", "-"), _counted_slices(found[1])
        given = computation.operands(instruction)[0].bytes
        payload = given * slices if kind == "all-gather" else given
        sent = _sent(kind, payload, slices)
        yield Collective(kind, sent, slices, times, payload, scope=instruction.scope, slices=slices)
    elif instruction.op == "fusion":
        for called in instruction.called:
            yield from _fused(program, program.computations[called], instruction, times)


def _fused(program: Program, inner: Computation, fusion: Instruction, times: int) -> Iterator[Collective]:
    """Yield what a fusion hides: a TPU's reduce-scatter is a sum that is reduced, and cut where it arrives."""
    for each in inner.instructions:
        if each.op == "fusion":
            for called in each.called:
                yield from _fused(program, program.computations[called], each, times)
        elif each.op.removesuffix("-start") in KINDS:
            cut = each.op == "all-reduce" and "all-reduce-scatter" in fusion.attributes
            yield _collective(program, inner, each, "reduce-scatter" if cut else each.op, times, fusion.scope)


def _collective(
    program: Program, computation: Computation, instruction: Instruction, kind: str, times: int, scope: str = ""
) -> Collective:
    given = sum(each.bytes for each in computation.operands(instruction))
    group = _group(program, instruction)
    size = len(group)
    payload = given * size if kind == "all-gather" else given
    return Collective(kind, _sent(kind, payload, size), size, times, payload, group, scope or instruction.scope)


def _sent(kind: str, payload: float, size: int) -> float:
    share = (size - 1) / size
    return payload * {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(kind, share)


def _counted_slices(listed: str) -> int:
    """Return how many slices ``1,2`` or ``0:3`` names: the last of a range is one of them."""
    ends = [list(map(int, part.split(":"))) for part in listed.split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)


def _group(program: Program, instruction: Instruction) -> tuple[int, ...]:
    """Return the first group of devices that a collective runs in."""
    text = instruction.attributes
    if instruction.op.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", text.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        return next(((int(one), int(other)) for one, other in pairs if one != other), (0,))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return tuple(map(int, filter(None, listed[1].split(","))))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if counted:
        return _counted(*(tuple(map(int, filter(None, (part or "").split(",")))) for part in counted.groups()))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", text
    )
    if named:
        sizes, dims, order, axes = named.groups()
        return _named(sizes, axes, *(tuple(map(int, part.split(","))) if part else () for part in (dims, order)))
    if "replica_groups={}" in text:
        return tuple(range(program.devices))
    raise ValueError(f"traffic: groups of devices in an unknown form: {text[:300]!r}")


def _counted(
    groups: tuple[int, ...], size: tuple[int, ...], dims: tuple[int, ...], order: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the first of groups such as ``[2,4]<=[4,2]T(1,0)``: numbers counted in one shape, turned into another."""
    numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
    return tuple(numbers.reshape(*groups, *size)[0].tolist()) if size else tuple(numbers.ravel().tolist())


def _named(sizes: str, axes: str, dims: tuple[int, ...] = (), order: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return the first of groups such as ``mesh['a'=2,'b'=4] {'b'}``, or ``{'b':(2)2}`` for a part of an axis.

    Where devices stand otherwise than counted, ``dims`` and ``order`` say how, as in ``_counted``.
    """
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    count = math.prod(shape.values())
    counted = _counted((count,), (), dims or (count,), order)
    numbers = np.array(counted).reshape(tuple(shape.values()))
    index = [np.array([0])] * len(shape)
    for place, name in enumerate(shape):
        for before, part in re.findall(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", axes):
            lead, inner = int(before or 1), int(part or shape[name])
            steps = np.arange(inner) * (shape[name] // (lead * inner))
            index[place] = np.add.outer(index[place], steps).ravel()
    return tuple(numbers[np.ix_(*index)].ravel().tolist())

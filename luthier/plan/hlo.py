"""What a compiled program says of itself: its computations, and how often each instruction runs.

XLA prints a program as text, and offers no other public view of it that knows how often a loop turns. So the text is
read here, in the forms that the compilers for TPUs, GPUs and CPUs print.

Left out on purpose: shapes that are only known when a program runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
FAST_MEMORY = "S(1)"
"""What the layout of an array says that lies in a TPU's own vector memory, and not in its HBM."""


@dataclass(frozen=True)
class Array:
    """An array of a shape: its bytes, and whether it lies in the device's main memory."""

    bytes: float
    main: bool


@dataclass(frozen=True)
class Instruction:
    """A line of a computation. ``shape`` and ``attributes`` are as they are printed, operands are names."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it makes."""
        return tuple(
            Array(math.prod(map(int, filter(None, sizes.split(",")))) * _bits(kind) / 8, FAST_MEMORY not in layout)
            for kind, sizes, layout in _ARRAY.findall(self.shape)
        )

    @property
    def bytes(self) -> float:
        """The bytes of what it makes."""
        return sum(array.bytes for array in self.arrays)

    @property
    def main_bytes(self) -> float:
        """The bytes of what it makes that lie in main memory."""
        return sum(array.bytes for array in self.arrays if array.main)

    @property
    def called(self) -> list[str]:
        """The computations that it runs, its conditions and the sums of reductions aside."""
        names = [name for _, name in _CALLED.findall(self.attributes)]
        return names + [name.strip().lstrip("%") for name in _branches(self.attributes)]

    @property
    def scope(self) -> str:
        """The names of the program's parts that it came from, as in a profile."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions in order, and by name."""

    instructions: tuple[Instruction, ...]
    by_name: dict[str, Instruction] = field(repr=False)

    @property
    def root(self) -> Instruction:
        """What it gives."""
        return next(each for each in self.instructions if each.root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return what an instruction is given."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclass(frozen=True)
class Program:
    """A compiled program, which ``devices`` devices run together."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yield each instruction that runs, with the computation it stands in and how often it does.

        The body of a loop whose turns are not known counts once, and each branch of a choice too. What is inside of a
        fusion is not yielded, and an operation that was made asynchronous is yielded as what it does.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.instructions:
            yield computation, instruction, times
            if instruction.op not in ("while", "call", "conditional", "async-start"):
                continue
            turns = self.turns(computation, instruction) or 1 if instruction.op == "while" else 1
            for called in instruction.called:
                yield from self._executed(called, times * turns)

    def turns(self, computation: Computation, loop: Instruction) -> int | None:
        """Return how often a loop turns, None where its text does not say: its condition is more than a count."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self.computations[name] for name in _condition_and_body(loop))
        counted = [each for each in condition.operands(condition.root) if each.op == "get-tuple-element"]
        limit = _constant(condition, condition.root)
        if "direction=LT" not in condition.root.attributes or limit is None or len(counted) != 1:
            return None
        place = _place(counted[0])
        step = _constant(body, body.by_name[body.root.operands[place]])
        given = computation.by_name[loop.operands[0]]
        start = _constant(computation, computation.by_name[given.operands[place]]) if given.op == "tuple" else 0
        return None if step is None else -(-(limit - (start or 0)) // step)


def parse(text: str) -> Program:
    """Return the program that ``Compiled.as_text`` printed."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$", line)
        if header and not line.startswith(" "):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(tuple(lines), {each.name: each for each in lines})
        elif line.startswith("  "):
            found = _instruction(line.strip())
            if found is not None:
                lines.append(found)
    devices = [int(count) for count in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])]
    return Program(computations, entry, math.prod(devices))


def _instruction(line: str) -> Instruction | None:
    named, equals, rest = line.partition(" = ")
    if not equals:
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest)
    operands = re.findall(r"%([\w.\-]+)", rest[len(op) : close])
    value = rest[len(op) + 1 : close] if op in ("constant", "parameter") else ""
    return Instruction(
        name=named.removeprefix("ROOT ").lstrip("%"),
        shape=shape,
        op=op,
        operands=tuple(operands),
        attributes=value + rest[close + 1 :],
        root=named.startswith("ROOT "),
    )


def _closing(text: str) -> int:
    """Return where the first bracket of ``text`` is closed."""
    depth = 0
    for place in (found.start() for found in re.finditer(r"[()]", text)):
        depth += 1 if text[place] == "(" else -1
        if depth == 0:
            return place
    raise ValueError(f"hlo: brackets without an end in {text[:200]!r}")


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", kind)  # f32, bf16, s4, u16, c64, f8e4m3fn; tokens take nothing
    return int(found[1]) if found else 0


def _branches(attributes: str) -> list[str]:
    found = _BRANCHES.search(attributes)
    return found[1].split(",") if found else []


def _condition_and_body(loop: Instruction) -> list[str]:
    found = (re.search(rf"\b{name}=%?([\w.\-]+)", loop.attributes) for name in ("condition", "body"))
    return [name[1] for name in found if name]


def _place(element: Instruction) -> int:
    found = re.search(r"index=(\d+)", element.attributes)
    return int(found[1]) if found else 0


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    """Return the number that an instruction is, copies, or adds to or compares with something else."""
    if instruction.op == "constant":
        found = re.match(r"-?\d+", instruction.attributes)
        return int(found[0]) if found else None
    if instruction.op not in ("copy", "add", "compare"):
        return None
    values = (_constant(computation, each) for each in computation.operands(instruction))
    return next((value for value in values if value is not None), None)

"""How many bytes a compiled program moves between a device's main memory and what computes.

Counted from the program's text, by instruction: what it reads and what it writes, of a slice only the slice, and
nothing of what stays in a TPU's vector memory. Every instruction is counted as often as it runs.

Left out on purpose: caches, which make it less on a GPU and a CPU.
"""

from __future__ import annotations

from luthier.plan.hlo import Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "domain", "add-dependency"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}


def moved(program: Program) -> float:
    """Return the bytes that one run of the program reads and writes on each device."""
    return sum(times * _of(program, computation, each) for computation, each, times in program.executed())


def _of(program: Program, computation: Computation, instruction: Instruction) -> float:
    op = instruction.op
    if op in _FREE or op.endswith(("-done", "-update")) or op.startswith("async"):
        return 0.0
    if op == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0.0
    if op in _SLICES:
        return 2 * instruction.main_bytes
    if op == "dynamic-update-slice":
        return 2 * computation.operands(instruction)[1].main_bytes
    if op.endswith("-start"):  # what it makes lists what it reads, too
        return instruction.main_bytes
    if op == "fusion":
        return _fusion(program, computation, instruction)
    return instruction.main_bytes + sum(each.main_bytes for each in computation.operands(instruction))


def _fusion(program: Program, computation: Computation, fusion: Instruction) -> float:
    """Count of each operand what is read of it, and of the result what is written."""
    inner = program.computations[fusion.called[0]]
    parameters = _parameters(inner)
    updates = [each for each in inner.instructions if each.op == "dynamic-update-slice"]
    targets = {_origin(inner, each.operands[0]) for each in updates}
    read = 0.0
    for place, operand in enumerate(computation.operands(fusion)):
        if operand.main_bytes and parameters[place] not in targets:
            read += min(operand.main_bytes, _read(program, inner, parameters[place]))
    if not updates:
        return read + fusion.main_bytes
    whole = sum(inner.by_name[each.operands[0]].bytes for each in updates)
    changed = sum(inner.by_name[each.operands[1]].bytes for each in updates)
    return read + max(fusion.main_bytes - whole, 0.0) + changed


def _read(program: Program, inner: Computation, name: str) -> float:
    """Return the bytes that a fusion reads of what it has under ``name``: where it only cuts from it, what it cuts."""
    read = 0.0
    for user in (each for each in inner.instructions if name in each.operands):
        if user.op == "bitcast":
            read += _read(program, inner, user.name)
        elif user.op == "fusion":
            nested = program.computations[user.called[0]]
            places = [place for place, operand in enumerate(user.operands) if operand == name]
            read += sum(_read(program, nested, _parameters(nested)[place]) for place in places)
        elif user.op in _SLICES and user.operands[0] == name:
            read += user.bytes
        else:
            return inner.by_name[name].bytes
    return read


def _parameters(inner: Computation) -> dict[int, str]:
    return {int(each.attributes.split(",")[0]): each.name for each in inner.instructions if each.op == "parameter"}


def _origin(inner: Computation, name: str) -> str:
    while inner.by_name[name].op in ("bitcast", "copy"):
        name = inner.by_name[name].operands[0]
    return name

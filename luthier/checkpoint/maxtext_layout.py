"""One array of MaxText's tree and the Hugging Face tensors in it, there and back.

Left out on purpose: which tensor lies where (``maxtext_families``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import einops
import numpy as np

_PADDED = 256  # MaxText's converter takes a vocabulary for the same one where it is longer by less


@dataclass(frozen=True)
class Rule:
    """How one tensor lies in MaxText's tree.

    It is called ``name`` there, and arranged by the einops ``layout``; its values are ``times`` a number ``plus`` one.
    """

    name: str
    layout: str
    times: float = 1.0
    plus: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether values are others than the tensor's."""
        return self.times != 1 or self.plus != 0

    @property
    def only_scales_exactly(self) -> bool:
        """Whether values are but multiplied by a power of two, which loses nothing where the exponent has room."""
        return self.plus == 0 and math.frexp(self.times)[0] == 0.5


class Index(NamedTuple):
    """Which layer and which expert of a leaf a tensor is; None where that is no axis of it."""

    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Leaf:
    """One array of MaxText's tree.

    ``members`` says for each Hugging Face tensor in it which slice it is; the axis of experts leads, and that of
    layers is ``axis``. ``shape`` is what MaxText's own model has.
    """

    path: str
    rule: Rule
    sizes: Mapping[str, int]
    shape: tuple[int, ...]
    axis: int
    members: dict[str, Index] = field(default_factory=dict)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its Hugging Face tensors."""
        return _lengths(self.rule.layout.split(" -> ")[0], self.sizes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can be the leaf: the vocabulary may be padded."""
        return len(shape) == len(self.shape) and all(
            found == wanted or (number == self._vocabulary and 0 < found - wanted < _PADDED)
            for number, (found, wanted) in enumerate(zip(shape, self.shape, strict=True))
        )

    def tensor(self, array: np.ndarray, name: str, dtype: Any) -> np.ndarray:
        """Return the Hugging Face tensor ``name`` from the leaf's array."""
        piece = array[self._slice(name)]
        if self._vocabulary is not None:
            piece = _resized(piece, self._vocabulary, self.sizes["vocab"])
        if self.rule.changes:
            piece = _restored(piece, self.rule, dtype)
        left, right = self.rule.layout.split(" -> ")
        given = {each: size for each, size in self.sizes.items() if each in _joined(right)}
        return einops.rearrange(piece, f"{right} -> {left}", **given).astype(dtype, copy=False)

    def fill(self, array: np.ndarray, name: str, tensor: np.ndarray) -> None:
        """Write the Hugging Face tensor ``name`` into the leaf's array: ``tensor`` backwards."""
        left, right = self.rule.layout.split(" -> ")
        given = {each: size for each, size in self.sizes.items() if each in _joined(left)}
        piece = einops.rearrange(tensor, f"{left} -> {right}", **given)
        place = array[self._slice(name)]
        if self._vocabulary is not None:
            piece = _resized(piece, self._vocabulary, place.shape[self._vocabulary])
        place[...] = _changed(piece, self.rule, array.dtype) if self.rule.changes else piece

    @property
    def _vocabulary(self) -> int | None:
        names = self.rule.layout.split(" -> ")[1].split()
        return names.index("vocab") if "vocab" in names else None

    def _slice(self, name: str) -> tuple[int | slice, ...]:
        layer, expert = self.members[name]
        places: list[int | slice] = [] if expert is None else [expert]
        if layer is not None:
            places += [slice(None)] * (self.axis - len(places))
            places.insert(self.axis, layer)
        return tuple(places)


def leaf_shape(leaf: Leaf, vocabulary: int) -> tuple[int, ...]:
    """Return the shape of a leaf with these members, in a model of so many tokens."""
    sizes = dict(leaf.sizes)
    if "vocab" in sizes:
        sizes["vocab"] = vocabulary
    shape = list(_lengths(leaf.rule.layout.split(" -> ")[1], sizes))
    layers = {layer for layer, _ in leaf.members.values() if layer is not None}
    experts = {expert for _, expert in leaf.members.values() if expert is not None}
    if experts:
        shape.insert(0, len(experts))
    if layers:
        shape.insert(leaf.axis, len(layers))
    return tuple(shape)


def sizes_of(layout: str, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int]:
    """Return {name in the layout: its size} for a tensor of this shape, whose joined axes have ``known`` parts."""
    found: dict[str, int] = {}
    for group, length in zip(_groups(layout.split(" -> ")[0]), shape, strict=True):
        given = {name: known[name] for name in group if name in known}
        rest = math.prod(given.values())
        found |= given | {name: length // rest for name in group if name not in given}
    return found


def _lengths(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[name] for name in group) for group in _groups(side))


def _groups(side: str) -> list[list[str]]:
    return [(group or single).split() for group, single in re.findall(r"\(([^)]*)\)|(\w+)", side)]


def _joined(side: str) -> set[str]:
    """Return the names that einops has to be told the sizes of."""
    return {name for group in _groups(side) if len(group) > 1 for name in group}


def _resized(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return ``array`` cut to ``size`` along ``axis``, or filled up with zeros."""
    kept = array[(*[slice(None)] * axis, slice(size))]
    missing = size - kept.shape[axis]
    if not missing:
        return kept
    return np.pad(kept, [(0, missing if number == axis else 0) for number in range(array.ndim)])


def _changed(piece: np.ndarray, rule: Rule, dtype: Any) -> np.ndarray:
    values = piece.astype(np.float32)
    values *= np.float32(rule.times)
    values += np.float32(rule.plus)
    return values.astype(dtype, copy=False)


def _restored(piece: np.ndarray, rule: Rule, dtype: Any) -> np.ndarray:
    values = piece.astype(np.float32)
    values -= np.float32(rule.plus)
    values /= np.float32(rule.times)
    return values.astype(dtype, copy=False)

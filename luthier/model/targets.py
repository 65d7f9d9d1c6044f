"""Which weights an adapter can have as targets, by the names of Transformers' modules.

A target is what PEFT adapts as one: an ``nn.Linear`` of a layer, or the tensor of all routed experts of a layer.
Several of our weights may be rows of one target (Phi-3's ``qkv_proj``); they share its ``a``, and each has its rows of
``b``.

Left out on purpose: embeddings, the head and routers, which PEFT's "all-linear" leaves out too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import einops
import jax
import jax.numpy as jnp

from luthier.errors import UserError, did_you_mean
from luthier.model.param import Param, Part, Tree, leaves
from luthier.model.quant import is_quantised

ALL_LINEAR = "all-linear"
# Checkpoints keep names that Transformers has given up for its modules.
_RENAMED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    ".block_sparse_moe.": ".mlp.",
}
_OF_EXPERTS = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}

Path = tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """A weight that is rows of a target; ``path`` is its place in the model's tree.

    ``part`` says which rows, where they are not all.
    """

    path: Path
    param: Param
    part: Part | None

    @property
    def experts(self) -> int:
        """Over how many experts the weight is stacked, 0 where it is of none."""
        return dict(zip(self.param.axes, self.param.shape, strict=True)).get("expert", 0)

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The layout's names of the matrix's rows and of its columns."""
        sides = self.param.sides
        if len(sides) == 2:
            return sides[0], sides[1]
        return sides[2], sides[1]  # one tensor of all experts, input first

    @property
    def sizes(self) -> dict[str, int]:
        """{name of the layout: its size in the whole target}."""
        sizes = dict(zip(self.param.names, self.param.slice_shape, strict=True))
        return sizes if self.part is None else sizes | {self.part.axis: self.part.whole}

    def axis(self, name: str) -> str:
        """Return the logical axis of one of the layout's names."""
        return dict(zip(self.param.names, self.param.slice_axes, strict=True))[name]

    def rows(self, whole: jax.Array, axis: int) -> jax.Array:
        """Return this weight's rows of an array that has all of the target's on a negative ``axis``."""
        if self.part is None:
            return whole
        split = whole.reshape(*whole.shape[:axis], *self._row_sizes, *whole.shape[len(whole.shape) + axis + 1 :])
        own = split[(*[slice(None)] * (whole.ndim + axis), *self._own_rows)]
        return own.reshape(*whole.shape[:axis], -1, *whole.shape[len(whole.shape) + axis + 1 :])

    def put_rows(self, whole: jax.Array, own: jax.Array, axis: int) -> jax.Array:
        """Return ``whole`` with this weight's rows set: ``rows`` backwards."""
        if self.part is None:
            return own
        split = whole.reshape(*whole.shape[:axis], *self._row_sizes, *whole.shape[len(whole.shape) + axis + 1 :])
        place = (*[slice(None)] * (whole.ndim + axis), *self._own_rows)
        return split.at[place].set(own.reshape(split[place].shape)).reshape(whole.shape)

    def matrix(self, weight: Any) -> jax.Array:
        """Return a weight, an array or quantised, as fp32 ``[..., rows, columns]``."""
        if is_quantised(weight):
            return weight.matrix(jnp.float32)
        lead = "e " if self.experts and "expert" in self.param.slice_axes else ""
        out, into = (" ".join(side) for side in self.sides)
        names = " ".join(name for name in self.param.names if self.axis(name) != "expert")
        return einops.rearrange(weight.astype(jnp.float32), f"... {lead}{names} -> ... {lead}({out}) ({into})")

    @property
    def _row_sizes(self) -> list[int]:
        return [self.sizes[name] for name in self.sides[0]]

    @property
    def _own_rows(self) -> tuple[slice, ...]:
        assert self.part is not None
        count = dict(zip(self.param.names, self.param.slice_shape, strict=True))[self.part.axis]
        own = slice(self.part.start, self.part.start + count * self.part.step, self.part.step)
        return tuple(own if name == self.part.axis else slice(None) for name in self.sides[0])


@dataclass(frozen=True)
class Unit:
    """A target: ``module`` is its name, with a placeholder ``{layer}``."""

    module: str
    members: tuple[Member, ...]

    @property
    def path(self) -> Path:
        """The place of its adapter in a tree of adapters."""
        return (*self.members[0].path[:-1], self.module.rpartition(".")[2])

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are stacked."""
        return dict(self.members[0].param.stack)["layer"]

    @property
    def names(self) -> list[str]:
        """The names of its modules, one for each layer."""
        return [self.module.format(layer=layer) for layer in self.layers]

    @property
    def experts(self) -> int:
        """Over how many experts it is stacked, 0 where it is of none."""
        return self.members[0].experts

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the stacked axes of its matrices."""
        return (len(self.layers), *([self.experts] if self.experts else []))

    @property
    def lead_axes(self) -> tuple[str, ...]:
        """The names of the stacked axes."""
        return ("layer", *(["expert"] if self.experts else []))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns each of its matrices has."""
        first = self.members[0]
        rows, columns = (prod(first.sizes[name] for name in side) for side in first.sides)
        return rows, columns

    @property
    def axes(self) -> tuple[str, str]:
        """The logical axes of rows and columns: rows that several weights share are kept whole."""
        first = self.members[0]
        rows, columns = first.sides
        shared = first.part is not None and first.part.axis == rows[0]
        return "rows" if shared else first.axis(rows[0]), first.axis(columns[0])


def adaptable(model_spec: Tree) -> list[Unit]:
    """Return all that can be a target in a model."""
    found: dict[tuple[str, Path], list[Member]] = {}
    for name, param in leaves(model_spec).items():
        if not _can_be_adapted(name, param):
            continue
        path = tuple(name.split("/"))
        module, part = _module(path, param)
        found.setdefault((module, path[:-1]), []).append(Member(path, param, part))
    return [Unit(module, tuple(members)) for (module, _), members in found.items()]


def chosen(model_spec: Tree, targets: str | tuple[str, ...]) -> list[Unit]:
    """Return the targets of a model that ``targets`` names.

    "all-linear" means all; another string is a regular expression that must match a module's whole name; a tuple's
    names match a module of that name or of one that ends in it, as in PEFT, where experts must be named as such:
    ``experts.down_proj``.

    Raises UserError where something is named that is not there or cannot be adapted, or only in some of the layers
    that are stored together.
    """
    every = adaptable(model_spec)
    if targets == ALL_LINEAR:
        return every
    if isinstance(targets, str):
        found = [unit for unit in every if _all_or_none(unit, _matched(unit, targets), targets)]
        if not found:
            raise UserError(_nothing(f"the regular expression `{targets}`", targets, model_spec, every))
        return found
    for target in targets:
        if not any(any(_named(unit, target)) for unit in every):
            raise UserError(_nothing(f"`{target}`", target, model_spec, every))
    return [unit for unit in every if _all_or_none(unit, _named_by_any(unit, targets), ", ".join(targets))]


def _can_be_adapted(name: str, param: Param) -> bool:
    return name.startswith("layers/") and param.decays and "router" not in param.axes


def _module(path: Path, param: Param) -> tuple[str, Part | None]:
    """Return the name of the module that has a weight, and which of its rows are the weight's."""
    name = _renamed(param.tensor)
    if "{expert}" not in name:
        return name, param.part
    # Checkpoints have a tensor for each expert; Transformers joins them, and gate and up.
    module = f"{name.partition('.{expert}')[0]}.{_OF_EXPERTS[path[-1]]}"
    if path[-1] == "down":
        return module, None
    rows = param.sides[0][0]
    count = dict(zip(param.names, param.slice_shape, strict=True))[rows]
    return module, Part(rows, 0 if path[-1] == "gate" else count, 2 * count)


def _renamed(tensor: str) -> str:
    name = tensor.removesuffix(".weight")
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _matched(unit: Unit, pattern: str) -> list[bool]:
    """Say of each layer's module whether the regular expression matches its name."""
    try:
        return [re.fullmatch(pattern, name) is not None for name in unit.names]
    except re.error as error:
        raise UserError(f"lora_target_modules=`{pattern}` is no regular expression: {error}.") from None


def _named(unit: Unit, target: str) -> list[bool]:
    """Say of each layer's module whether ``target`` names it."""
    if unit.experts and "experts." not in target:
        return [False] * len(unit.layers)
    return [name == target or name.endswith(f".{target}") for name in unit.names]


def _named_by_any(unit: Unit, targets: tuple[str, ...]) -> list[bool]:
    return [any(of_layer) for of_layer in zip(*(_named(unit, target) for target in targets), strict=True)]


def _all_or_none(unit: Unit, found: list[bool], target: str) -> bool:
    if any(found) and not all(found):
        layers = ", ".join(str(layer) for layer, one in zip(unit.layers, found, strict=True) if one)
        raise UserError(
            f"lora_target_modules=`{target}` names layers {layers} of {unit.module.format(layer='*')}, whose layers "
            f"{', '.join(map(str, unit.layers))} are adapted together. Name all of them, or none."
        )
    return all(found)


def _nothing(what: str, target: str, model_spec: Tree, every: list[Unit]) -> str:
    """Return the message for a target that names nothing which can be adapted."""
    others = {_renamed(param.tensor) for param in leaves(model_spec).values()} - {unit.module for unit in every}
    for name in sorted(others):
        plain = name.replace("{layer}", "0")
        if plain == target or plain.endswith(f".{target}"):
            return (
                f"lora_target_modules: {what} is {name.replace('{layer}', '*')}, which cannot be adapted. Linear "
                "layers and experts inside the model's layers can: " + _short(every)
            )
    close = did_you_mean(target, [_last(unit) for unit in every])
    return f"lora_target_modules: {what} matches no module of the model.{close} There are: " + _short(every)


def _short(every: list[Unit]) -> str:
    return ", ".join(dict.fromkeys(_last(unit) for unit in every)) + "."


def _last(unit: Unit) -> str:
    parts = unit.module.split(".")
    return ".".join(parts[-2:]) if unit.experts else parts[-1]

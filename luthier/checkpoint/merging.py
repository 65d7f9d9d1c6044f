"""An adapter merged into its base, tensor by tensor as they are read, in fp32.

A linear layer's tensor becomes ``W + scale * B A`` (arXiv 2106.09685), or with DoRA that with its rows scaled to their
magnitudes (arXiv 2402.09353, equation 5). Checkpoints have the experts that PEFT adapts as one tensor in a tensor each,
gate and up apart: each gets its rows. Left out on purpose: undoing it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.checkpoint import peft
from luthier.checkpoint.tensors import Stored
from luthier.model import lora
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.model.param import Param, Tree
from luthier.model.targets import Member, Unit

_FLOAT32 = np.dtype(np.float32)
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class _Factors:
    """The adapter of a target in one layer; ``a`` and ``b`` have a leading axis of experts where those are adapted."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


Read = Callable[[Unit, int], _Factors]


def merged(
    base: Mapping[str, Stored], config: Mapping[str, Any], name: str, folder: Path, exact: bool
) -> dict[str, Stored]:
    """Return ``base`` with the adapter in ``folder`` merged into it as tensors are read.

    ``config`` is the base's ``config.json`` and ``name`` what it is called. What is adapted comes in fp32 where
    ``exact``, else in the type that the base has it in.

    Raises UserError for an adapter that is not supported or does not fit.
    """
    spec = Model.from_hf(config, name).spec
    adapter = peft.read_config(folder)
    declared = lora.spec(spec, adapter)
    found = peft.read_tensors(folder)
    peft.check(found, declared, folder)
    read = lru_cache(maxsize=2)(partial(_factors, declared, found))
    result = dict(base)
    for unit in lora.units(spec, adapter):
        for member in unit.members:
            for tensor, index in member.param.tensors().items():
                if tensor in base:  # else the loader says what is missing
                    kind = _FLOAT32 if exact else base[tensor].dtype
                    values = partial(_values, base[tensor], member, index, unit, adapter, read, kind)
                    result[tensor] = Stored(base[tensor].shape, kind, values)
    return result


def _factors(declared: Tree, found: Mapping[str, Stored], unit: Unit, layer: int) -> _Factors:
    """Read what belongs to the ``layer``th of a target's stacked layers."""
    own = declared
    for step in unit.path:
        own = own[step]

    def values(param: Param) -> np.ndarray:
        name = next(name for name, index in param.tensors().items() if index == (layer,))
        return param.from_tensor(found[name].read().astype(np.float32))

    return _Factors(values(own["a"]), values(own["b"]), values(own["magnitude"]) if "magnitude" in own else None)


def _values(
    stored: Stored, member: Member, index: tuple[int, ...], unit: Unit, adapter: Adapter, read: Read, dtype: np.dtype
) -> np.ndarray:
    factors, tensor = read(unit, index[0]), stored.read()
    if not unit.experts:
        return _matrix(tensor, factors.a, factors.b, factors.magnitude, adapter.scale, dtype)
    if len(index) == 2:  # one expert's tensor, gate or up or down
        expert = index[1]
        rows = member.part and slice(member.part.start, member.part.start + tensor.shape[0])
        own = factors.b[expert] if rows is None else factors.b[expert][rows]
        return _matrix(tensor, factors.a[expert], own, None, adapter.scale, dtype)
    whole = np.empty(tensor.shape, dtype)  # a tensor of all experts, input first
    for expert, values in enumerate(tensor):
        whole[expert] = _matrix(values.T, factors.a[expert], factors.b[expert], None, adapter.scale, dtype).T
    return whole


def _matrix(
    w: np.ndarray, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None, scale: float, dtype: np.dtype
) -> np.ndarray:
    """Return the merged matrix [out, in], some rows at a time so that no second whole fp32 copy arises."""
    result = np.empty(w.shape, dtype)
    for start in range(0, len(w), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        values = w[rows].astype(np.float32) + np.float32(scale) * (b[rows] @ a)
        if magnitude is not None:
            values *= (magnitude[rows] / np.linalg.norm(values, axis=1))[:, None]
        result[rows] = values
    return result

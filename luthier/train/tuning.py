"""What of a model is trained: its own weights, or an adapter beside weights that stay as they are.

The weights that stay, the base, are an argument of every program and part of no gradient, moment or checkpoint. They
are kept as they are computed with, or in fewer bits still.

Left out on purpose: how an adapter works (``model.lora``), its files (``checkpoint.peft``), and reading weights
(``job``): what is here follows from keys and shapes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from luthier.checkpoint import maxtext_names, peft
from luthier.checkpoint.source import adapter_folder
from luthier.config import RlConfig, SftConfig
from luthier.model import lora, param, quant
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.model.param import Param, Tree


class Base(NamedTuple):
    """The weights that stay, and what the adapter began as where that was not nothing (PiSSA, LoftQ)."""

    params: Tree
    begun: Tree = None


@dataclass(frozen=True)
class Tuning:
    """Which weights are trained: with an ``adapter`` its own, beside a base in ``dtype`` or ``quantization``."""

    model: Model
    adapter: Adapter | None = None
    quantization: str = ""
    weight_dtype: Any = jnp.float32
    dtype: Any = jnp.float32

    @cached_property
    def spec(self) -> Tree:
        """The tree of ``Param``s of what is trained."""
        return self.model.spec if self.adapter is None else lora.spec(self.model.spec, self.adapter)

    def weights(self, trained: Tree, base: Base | None, key: jax.Array | None = None) -> Tree:
        """Return the model's weights as they are computed with; with a ``key``, the adapter's inputs are dropped."""
        if self.adapter is None or base is None:
            return trained
        taken_away = base.begun if self.adapter.init == "pissa" else None
        return lora.attach(self.model.spec, base.params, self.adapter, trained, key, taken_away)

    @property
    def trained_dtype(self) -> Any:
        """The type of what is trained in memory: adapters are small, and so always exact."""
        return self.weight_dtype if self.adapter is None else jnp.dtype(jnp.float32)

    def base_dtype(self, declared: Param) -> Any:
        """Return the type that a weight of the base is kept in: matrices are computed with in no other than this."""
        return self.dtype if declared.multiplies else declared.dtype(jnp.dtype(jnp.float32))

    def abstract_base(self, mesh: Mesh) -> Base | None:
        """Return the base's shapes, types and shardings, None where there is none."""
        if self.adapter is None:
            return None
        params = quant.abstract(self.model.spec, self.quantization, self.base_dtype, mesh)
        begun = None if self.adapter.init == "default" else param.abstract(self.spec, self.trained_dtype, mesh)
        return Base(params, begun)

    def base_shardings(self, mesh: Mesh) -> Base | None:
        """Return where the base lies on ``mesh``."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_base(mesh))

    def base_bytes(self, mesh: Mesh) -> int:
        """Return what the base takes on each device."""
        leaves = jax.tree.leaves(self.abstract_base(mesh))
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def of(keys: SftConfig | RlConfig, model: Model, weight_dtype: Any, dtype: Any) -> Tuning:
    """Return what the keys ask to be trained of ``model``, computed in ``dtype``.

    Raises UserError for an adapter that is not there or does not fit the model.
    """
    if not keys.enable_lora:
        return Tuning(model, weight_dtype=weight_dtype, dtype=dtype)
    folder = path(keys)
    adapter = _adapter(keys, folder)
    tuning = Tuning(model, adapter, keys.quantization, weight_dtype, dtype)
    spec = tuning.spec  # raises where nothing, or what cannot be, is to be adapted
    if folder is not None:
        peft.check(peft.read_tensors(folder), spec, folder)
    return tuning


def path(keys: SftConfig | RlConfig) -> Path | None:
    """Return the folder of the adapter that training goes on from, None for a new one.

    Raises UserError where it is not there.
    """
    return adapter_folder(keys.lora_path, "lora_path", keys.hf_access_token) if keys.lora_path else None


def _adapter(keys: SftConfig | RlConfig, folder: Path | None) -> Adapter:
    if folder is not None:
        return replace(peft.read_config(folder), dropout=keys.lora_dropout)
    return Adapter(
        rank=keys.lora_rank,
        alpha=keys.lora_alpha,
        rslora=keys.use_rslora,
        dora=keys.use_dora,
        dropout=keys.lora_dropout,
        targets=_targets(keys.lora_target_modules),
        init=keys.lora_init,
    )


def _targets(asked: list[str]) -> str | tuple[str, ...]:
    """Return several names, or one, as a tuple, and what else stands alone as a text: a regular expression."""
    if len(asked) != 1 or re.fullmatch(r"[\w.]+", asked[0]):
        return tuple(asked)
    return maxtext_names.modules(asked[0]) if "/" in asked[0] else asked[0]

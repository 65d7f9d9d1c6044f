"""What of a model is trained: its own weights, or an adapter beside weights that stay as they are.

The weights that stay, the base, are an argument of every program and part of no gradient, moment or checkpoint. They
are kept as they are computed with, or in fewer bits still.

Left out on purpose: how an adapter works (``model.lora``), and its files (``checkpoint.peft``).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from luthier.checkpoint import huggingface, maxtext_names, peft, placing
from luthier.checkpoint.source import Source
from luthier.config import LoraKeys
from luthier.errors import UserError
from luthier.model import lora, param, quant
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.model.param import Param, Tree


class Base(NamedTuple):
    """The weights that stay, and what the adapter began as where that is to be taken away again (PiSSA)."""

    params: Tree
    origin: Tree = None


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
        return lora.attach(self.model.spec, base.params, self.adapter, trained, key, base.origin)

    @property
    def trained_dtype(self) -> Any:
        """The type of what is trained in memory: adapters are small, and so always exact."""
        return self.weight_dtype if self.adapter is None else jnp.dtype(jnp.float32)

    def base_dtype(self, declared: Param) -> Any:
        """Return the type that a weight of the base is kept in: matrices are computed with in no other than this."""
        matrix = len(declared.slice_shape) > 1 and "router" not in declared.axes
        return self.dtype if matrix else declared.dtype(jnp.dtype(jnp.float32))

    def abstract_base(self, mesh: Mesh) -> Base | None:
        """Return the base's shapes, types and shardings, None where there is none."""
        if self.adapter is None:
            return None
        params = quant.abstract(self.model.spec, self.quantization, self.base_dtype, mesh)
        origin = param.abstract(self.spec, self.trained_dtype, mesh) if self.adapter.init == "pissa" else None
        return Base(params, origin)

    def base_shardings(self, mesh: Mesh) -> Base | None:
        """Return where the base lies on ``mesh``."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_base(mesh))

    def base_bytes(self, mesh: Mesh) -> int:
        """Return what the base takes on each device."""
        leaves = jax.tree.leaves(self.abstract_base(mesh))
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def load_base(self, source: Source, mesh: Mesh, seed: int) -> Base | None:
        """Return the base, read from ``source``; None where there is none."""
        if self.adapter is None:
            return None
        params = self._load(source, mesh, seed, self.base_dtype, self.quantization)
        base = Base(params)
        return base if self.adapter.init != "pissa" else Base(params, self._begin(base, source, mesh, seed))

    def start(self, base: Base | None, source: Source, mesh: Mesh, seed: int, path: str = "") -> Tree:
        """Return what is trained as it is before the first step, an adapter from ``path`` where one is given."""
        if base is not None and path:
            return peft.load(path, self.spec, mesh)
        return self.reference(base, source, mesh, seed)

    def reference(self, base: Base | None, source: Source, mesh: Mesh, seed: int) -> Tree:
        """Return what stands for the model that training is held against: of adapters, one that changes nothing."""
        if base is None:
            return self._load(source, mesh, seed, self.weight_dtype)
        return self._begin(base, source, mesh, seed) if base.origin is None else jax.tree.map(jnp.copy, base.origin)

    def exported(self, base: Base, source: Source, mesh: Mesh, seed: int) -> Tree | None:
        """Return what is to be taken off an adapter, so that it is one of the weights of ``source`` as they are.

        LoftQ's begins as what quantising took from them, which they have.
        """
        loftq = self.adapter is not None and self.adapter.init == "loftq"
        return self._begin(base, source, mesh, seed) if loftq else base.origin

    def _begin(self, base: Base, source: Source, mesh: Mesh, seed: int) -> Tree:
        assert self.adapter is not None

        def floats(declared: Param) -> jax.Array:
            """Return a weight as it was before it was quantised."""
            if source.kind == "random":
                raise UserError("lora_init=loftq needs the weights of a checkpoint: leave it out with random ones.")
            alone = {"weight": declared}
            return huggingface.load(source, alone, jnp.float32, mesh, ignored=(".*",))["weight"]

        return lora.initialise(self.model.spec, base.params, self.adapter, jax.random.key(seed), mesh, floats)

    def _load(self, source: Source, mesh: Mesh, seed: int, dtype: Any, quantization: str = "") -> Tree:
        spec = self.model.spec
        if source.kind == "random":
            return placing.random(spec, jax.random.key(seed), quantization, dtype, mesh)
        return huggingface.load(source, spec, dtype, mesh, self.model.config.ignored, quantization=quantization)


def of(keys: LoraKeys, model: Model, weight_dtype: Any, dtype: Any) -> Tuning:
    """Return what the keys ask to be trained of ``model``, computed in ``dtype``.

    Raises UserError for an adapter that is not there or does not fit the model.
    """
    if not keys.enable_lora:
        return Tuning(model, weight_dtype=weight_dtype, dtype=dtype)
    adapter = _adapter(keys)
    tuning = Tuning(model, adapter, keys.quantization, weight_dtype, dtype)
    spec = tuning.spec  # raises where nothing, or what cannot be, is to be adapted
    if keys.lora_path:
        peft.check(peft.read_tensors(keys.lora_path), spec, keys.lora_path)
    return tuning


def _adapter(keys: LoraKeys) -> Adapter:
    if keys.lora_path:
        return replace(peft.read_config(keys.lora_path), dropout=keys.lora_dropout)
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

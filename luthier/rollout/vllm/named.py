"""A policy's weights in the names, shapes and order that a vLLM server loads.

Left out on purpose: sending them (``weights``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from luthier.checkpoint import huggingface
from luthier.model.lora import Lora
from luthier.model.param import Tree


def full(spec: Tree, dtype: Any) -> Callable[[Tree], Iterator[tuple[str, np.ndarray]]]:
    """Return ``tensors(params)``: (Hugging Face name, values of type ``dtype``) of all tensors, layer by layer.

    A quantised weight comes as what it stands for, an adapted one as its base. Sharded arrays are gathered one tensor
    at a time: all processes go through it together.
    """

    def tensors(params: Tree) -> Iterator[tuple[str, np.ndarray]]:
        base = jax.tree.map(_base, params, is_leaf=lambda weight: isinstance(weight, Lora))
        found = huggingface.outgoing(base, spec, jnp.dtype(dtype))
        for name in sorted(found, key=_place):
            yield name, found[name].read()

    return tensors


def _base(weight: Any) -> Any:
    return weight.base if isinstance(weight, Lora) else weight


def _place(name: str) -> list[str | int]:
    """Return what names are ordered by: vLLM holds back what it has of a layer until it has all of that."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

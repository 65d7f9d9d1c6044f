"""The values that rooms hand each other.

Left out on purpose: anything with behaviour. Rendering, packing and losses are functions elsewhere; these are only
their arguments and results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

Array = Any
"""A numpy array on the host, a jax array inside a program, a shape where a program is compiled from shapes alone."""


@dataclass(frozen=True)
class Conversation:
    """One row after its schema was read.

    ``messages`` are ``{"role", "content", ...}`` dictionaries as chat templates take them, ``tools`` the row's tool
    definitions. A row of plain text has ``text`` and no messages; every token of it is trained. ``prompt_messages``
    counts the leading messages that are context only, never trained (the prompt of a prompt and completion pair).
    """

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    prompt_messages: int = 0


@dataclass(frozen=True)
class Example:
    """One tokenised row: ``ids_T`` int32 and ``mask_T`` bool (true where the token is trained)."""

    ids_T: np.ndarray
    mask_T: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Token arrays of one (micro-)batch, each ``[B, T]``.

    ``segments_BT`` is 0 on padding and 1, 2, ... for the conversations packed into a row; ``positions_BT`` restart
    at 0 with each segment; both are int32. ``mask_BT`` is true where the token at that very position is a trained
    target; it is false on a segment's first token, which nothing precedes.
    """

    tokens_BT: Array
    positions_BT: Array
    segments_BT: Array
    mask_BT: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """A loss as a sum and its weight, so that micro-batches, devices and hosts add up before the one division.

    ``metrics`` maps a name to such a (sum, weight) pair.
    """

    sum: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]] = field(default_factory=dict)

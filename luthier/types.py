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

    ``metrics`` maps a name to such a (sum, weight) pair, ``maxima`` a name to a value of which the greatest counts,
    ``counts`` a name to a number that is reported as it adds up.
    """

    sum: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    maxima: dict[str, Array] = field(default_factory=dict)
    counts: dict[str, Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollouts:
    """What a policy loss sees of B completions of up to T tokens; log-probs are at the sampling temperature, fp32.

    ``mask_BT`` is true on the model's own tokens that are trained. ``sampler_logp_BT`` is what the sampler said when it
    drew them. ``old_logp_BT`` is what the policy says whose ratio to the current one is clipped: the sampler itself, or
    the trainer before the first update on these completions; None stands for the current policy as it is.
    ``reference_logp_BT`` is what the reference policy says, None without one. Outside the mask they mean nothing.
    """

    mask_BT: Array
    sampler_logp_BT: Array
    old_logp_BT: Array
    reference_logp_BT: Array | None
    advantages_B: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Completions packed into B rows of T tokens, in which each prompt stands once before its completions.

    ``segments_BT`` is 0 on padding and 1, 2, ... for prompts and completions; ``prefixes_BT`` is the segment that a
    token's own segment goes on from: its prompt's for a completion, its own for a prompt. It is None where prompts are
    not shared: then a prompt and its one completion are one segment. ``positions_BT`` of a completion go on from its
    prompt's.

    M tokens of a row are scored: ``targets_BM``, each predicted from the state at ``sources_BM``. ``places_BSC`` finds
    token c of the row's sequence s among them. ``rollouts`` holds those B * S sequences, of C tokens.

    ``routes_BTLk`` int16 are the k experts that each of L layers is to send a token to, negative where its router
    chooses; None: everywhere.
    """

    tokens_BT: Array
    positions_BT: Array
    segments_BT: Array
    prefixes_BT: Array | None
    sources_BM: Array
    targets_BM: Array
    places_BSC: Array
    rollouts: Rollouts
    routes_BTLk: Array | None = None


@dataclass(frozen=True)
class Trajectory:
    """One completion on the host: ``prompt_T``, then ``tokens_T`` int32 of which the model itself drew ``mask_T``.

    ``sampler_logp_T``, ``old_logp_T`` and ``reference_logp_T`` as in ``Rollouts``. ``routes_TLk`` int16 are the experts
    that prompt and completion, but for its last token, are to be sent to; None: those that the router chooses.
    """

    prompt_T: np.ndarray
    tokens_T: np.ndarray
    mask_T: np.ndarray
    sampler_logp_T: np.ndarray
    old_logp_T: np.ndarray | None
    reference_logp_T: np.ndarray | None
    advantage: float
    routes_TLk: np.ndarray | None = None

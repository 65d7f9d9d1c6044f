"""Losses: pure functions over log-probs, never over a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from luthier.types import Loss

Algorithm = TypeVar("Algorithm", bound=Callable[..., Loss])


def linear(algorithm: Algorithm) -> Algorithm:
    """Mark a loss as linear in its log-probs.

    Its gradient with respect to them is then known before they are, and the head's gradient is formed in the forward
    pass (``model.cross_entropy``), which saves computing the logits twice.
    """
    algorithm.linear = True  # type: ignore[attr-defined]
    return algorithm


def is_linear(algorithm: Callable[..., Loss]) -> bool:
    """Say whether ``linear`` marked this loss."""
    return getattr(algorithm, "linear", False)

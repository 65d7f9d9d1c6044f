"""The reward that both sides of `rl.py` call. Standard library alone, since every worker's interpreter imports it."""

from __future__ import annotations

from typing import Any


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of even tokens in each completion: no work, and groups that differ."""
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]

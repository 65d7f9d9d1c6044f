"""From rewards to advantages, in float64 on the host. P prompts, G completions of each, F reward functions.

A reward of NaN is no reward: its completion gets the advantage 0 and counts in no mean. Left out on purpose: how
rewards come about, and which groups are dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STD_EPSILON = 1e-4
"""Added to standard deviations, which are the sample's (divided by n - 1), as TRL has both; the papers say neither."""

SAME_REWARD = 1e-8
"""Rewards closer than this are alike: sums of the same weighted rewards may differ in their last bits."""


def advantages(rewards_PG: np.ndarray, kind: str) -> np.ndarray:
    """Return ``[P, G]`` advantages of finite or NaN rewards.

    ``"group-std"``: over the group's mean, divided by its standard deviation (2402.03300). ``"group-mean"``: over the
    group's mean (2503.20783). ``"leave-one-out"``: over the mean of the others in the group (2402.14740).
    ``"batch-mean"``: over the batch's mean. ``"batch-std"``: over the group's mean, divided by the standard deviation
    of all rewards of the batch (2508.08221).
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    return np.nan_to_num(KINDS[kind](rewards_PG), nan=0.0)


def total(rewards_GF: np.ndarray, weights_F: np.ndarray) -> np.ndarray:
    """Return each completion's weighted sum over reward functions; NaN where every function gave NaN."""
    rewards_GF = np.asarray(rewards_GF, np.float64)
    given_GF = ~np.isnan(rewards_GF)
    summed_G = np.sum(np.where(given_GF, rewards_GF * weights_F, 0.0), axis=-1)
    return np.where(given_GF.any(axis=-1), summed_G, np.nan)


def zero_variance(rewards_PG: np.ndarray) -> np.ndarray:
    """Say of which groups nothing can be learnt: all rewards alike, or fewer than two."""
    rewards_PG = np.asarray(rewards_PG, np.float64)
    given_PG = ~np.isnan(rewards_PG)
    greatest_P = np.max(rewards_PG, axis=1, initial=-np.inf, where=given_PG)
    least_P = np.min(rewards_PG, axis=1, initial=np.inf, where=given_PG)
    return ~(greatest_P - least_P > SAME_REWARD)


def overlong_penalty(lengths: np.ndarray, max_new_tokens: int, buffer: int) -> np.ndarray:
    """Return what is added to the rewards of completions near the greatest length (2503.14476, eq. 13).

    0 up to ``max_new_tokens - buffer`` tokens, from there down in a line to -1 at ``max_new_tokens`` and beyond.

    Raises:
        ValueError: ``buffer`` is not from 1 to ``max_new_tokens``.
    """
    if not 1 <= buffer <= max_new_tokens:
        raise ValueError(f"overlong buffer {buffer}: give a number of tokens from 1 to {max_new_tokens}")
    over = np.asarray(lengths, np.float64) - (max_new_tokens - buffer)
    return -np.clip(over / buffer, 0.0, 1.0)


def _mean(rewards: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the mean of what is not NaN, with its axes kept; NaN where there is nothing."""
    given = ~np.isnan(rewards)
    count = np.sum(given, axis=axis, keepdims=True)
    summed = np.sum(np.where(given, rewards, 0.0), axis=axis, keepdims=True)
    return np.where(count > 0, summed / np.maximum(count, 1), np.nan)


def _std(rewards: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the sample standard deviation of what is not NaN, with its axes kept; NaN of fewer than two."""
    count = np.sum(~np.isnan(rewards), axis=axis, keepdims=True)
    variance = _mean(np.square(rewards - _mean(rewards, axis)), axis) * count / np.maximum(count - 1, 1)
    return np.where(count > 1, np.sqrt(variance), np.nan)


def _group_mean(rewards_PG: np.ndarray) -> np.ndarray:
    return rewards_PG - _mean(rewards_PG, 1)


def _group_std(rewards_PG: np.ndarray) -> np.ndarray:
    return _group_mean(rewards_PG) / (_std(rewards_PG, 1) + STD_EPSILON)


def _leave_one_out(rewards_PG: np.ndarray) -> np.ndarray:
    count_P1 = np.sum(~np.isnan(rewards_PG), axis=1, keepdims=True)
    others_P1 = np.where(count_P1 > 1, count_P1 - 1, np.nan)
    return _group_mean(rewards_PG) * count_P1 / others_P1


def _batch_mean(rewards_PG: np.ndarray) -> np.ndarray:
    return rewards_PG - _mean(rewards_PG, None)


def _batch_std(rewards_PG: np.ndarray) -> np.ndarray:
    return _group_mean(rewards_PG) / (_std(rewards_PG, None) + STD_EPSILON)


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group-std": _group_std,
    "group-mean": _group_mean,
    "leave-one-out": _leave_one_out,
    "batch-mean": _batch_mean,
    "batch-std": _batch_std,
}
"""Kinds of advantages by name, each from rewards ``[P, G]``; where a result is NaN the advantage is 0."""

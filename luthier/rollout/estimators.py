"""What many samples of each of P prompts say about a model: pass@k, maj@k, and how sure that is.

Left out on purpose: reading answers out of texts (``answers``) and scoring them (``reward``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
"""Times that prompts are drawn anew for a confidence interval."""


class Interval(NamedTuple):
    """A mean over prompts and its 95% confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(passed_PG: np.ndarray, k: int) -> np.ndarray:
    """Return for each prompt the chance that at least one of ``k`` samples passes, ``[P]``.

    Unbiased from G samples of which c passed: ``1 - C(G - c, k) / C(G, k)`` (Chen et al., arXiv 2107.03374, eq. 1),
    as a product that does not overflow. Raises ValueError where there are fewer than k samples.
    """
    G = passed_PG.shape[1]
    if not 1 <= k <= G:
        raise ValueError(f"pass@{k} of {G} samples")
    of_count = [1.0 if G - c < k else 1.0 - np.prod(1.0 - k / np.arange(G - c + 1, G + 1)) for c in range(G + 1)]
    return np.array(of_count)[passed_PG.astype(bool).sum(axis=1)]


def majority_at_k(answers_PG: Sequence[Sequence[str | None]], passed_PG: np.ndarray, k: int) -> np.ndarray:
    """Return for each prompt how often the most frequent of ``k`` answers passes, ``[P]``.

    The mean over the disjoint runs of k samples that G holds, each of which is a fair draw. None does not vote; of
    answers with equally many votes each counts its share, and no vote at all is a failure. Raises ValueError where
    there are fewer than k samples.
    """
    G = passed_PG.shape[1]
    if not 1 <= k <= G:
        raise ValueError(f"maj@{k} of {G} samples")
    starts = range(0, G - k + 1, k)
    return np.array(
        [
            np.mean([_vote(answers[start : start + k], passed[start : start + k]) for start in starts])
            for answers, passed in zip(answers_PG, passed_PG.astype(bool), strict=True)
        ]
    )


def interval(values_P: np.ndarray, seed: int) -> Interval:
    """Return the mean and its percentile bootstrap over prompts, 95%, the same for a seed."""
    random = np.random.default_rng(seed)
    P = len(values_P)
    means = [values_P[random.integers(P, size=P)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values_P.mean()), float(low), float(high))


def _vote(answers: Sequence[str | None], passed_K: np.ndarray) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    # Samples with one answer may still differ in whether they pass, where the reward looks at more than the answer.
    shares = [np.mean([ok for answer, ok in zip(answers, passed_K, strict=True) if answer == one]) for one in winners]
    return float(np.mean(shares))

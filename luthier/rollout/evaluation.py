"""What an evaluation says of a model: means, pass@k and maj@k of its rewards, with intervals over prompts.

`luthier eval` and the evaluations of `luthier rl` are told in these numbers alike. Left out on purpose: sampling, and
computing the rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.rollout import answers, estimators


def summarise(
    rewards_PGF: np.ndarray,
    texts_PG: Sequence[Sequence[str]],
    names: Sequence[str],
    *,
    every_k: Sequence[int] = (),
    threshold: float = 1.0,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return for each of F functions its mean, pass@k and maj@k, each a value with the ends of its 95% interval.

    A completion passes from a reward of ``threshold`` on. ``every_k`` empty stands for 1, 2, 4, ... up to G. Prompts
    with a completion of no reward (NaN) are left out of a function's numbers, and counted.
    """
    G = rewards_PGF.shape[1]
    every_k = sorted(set(every_k)) or [k for k in (2**power for power in range(G.bit_length())) if k <= G]
    answers_PG = [[answers.final_answer(said) for said in texts] for texts in texts_PG]
    summary: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        known_P = np.isfinite(rewards_PGF[:, :, number]).all(axis=1)
        summary[name] = {}
        if known_P.any():
            voted = [answers_PG[index] for index in np.flatnonzero(known_P).tolist()]
            values = _measures(rewards_PGF[known_P, :, number], voted, every_k, threshold)
            summary[name] |= {key: estimators.interval(value_P, seed)._asdict() for key, value_P in values.items()}
        summary[name]["unscored_prompts"] = int((~known_P).sum())
    return summary


def lengths(completions: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Return what is to be said of completions of these lengths and finishes."""
    counts = [length for length, _ in completions]
    finishes = Counter(finish for _, finish in completions)
    return {
        "mean_length": float(np.mean(counts)),
        "min_length": min(counts),
        "max_length": max(counts),
        "clipped_ratio": finishes["length"] / len(counts),
        "finish_reason": dict(finishes),
    }


def _measures(
    rewards_PG: np.ndarray, answers_PG: Sequence[Sequence[str | None]], every_k: Sequence[int], threshold: float
) -> dict[str, np.ndarray]:
    """Return the values of each measure, ``[P]``."""
    passed_PG = rewards_PG >= threshold
    values = {"mean": rewards_PG.mean(axis=1)}
    values |= {f"pass@{k}": estimators.pass_at_k(passed_PG, k) for k in every_k}
    return values | {f"maj@{k}": estimators.majority_at_k(answers_PG, passed_PG, k) for k in every_k if k > 1}

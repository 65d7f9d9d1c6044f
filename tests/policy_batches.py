"""Random completions for tests of policy losses: all kinds of lengths, gaps in masks, NaN wherever nothing counts."""

from __future__ import annotations

import dataclasses

import numpy as np

from luthier.types import Rollouts

LENGTHS = (6, 4, 1, 0, 5, 3, 6, 6)
ADVANTAGES = (1.3, -0.8, 0.5, np.nan, -1.7, 0.9, 1.1, -0.6)
STILL = (6, 7)
"""Sequences whose ratio of all tokens together lies within GSPO's clip range, though those of single tokens do not."""


def draw(seed: int = 2, moved: float = 0.4) -> tuple[np.ndarray, Rollouts, np.ndarray]:
    """Return log-probs, rollouts and entropies, fp32; log-ratios to the old policy have the deviation ``moved``."""
    random = np.random.default_rng(seed)
    batch, length = len(LENGTHS), max(LENGTHS)
    mask_BT = np.arange(length) < np.array(LENGTHS)[:, None]
    mask_BT[0, 2:4] = False  # what an environment said
    logp_BT = random.uniform(-3.0, -0.05, (batch, length))
    shift_BT = random.standard_normal((batch, length)) * moved
    for row in STILL:
        shift_BT[row] += 1e-4 - shift_BT[row, mask_BT[row]].mean()
    old_logp_BT = logp_BT - shift_BT
    sampler_logp_BT = old_logp_BT + random.standard_normal((batch, length)) * 0.6
    reference_logp_BT = logp_BT + random.standard_normal((batch, length)) * 0.5
    entropy_BT = random.uniform(0.1, 2.0, (batch, length))

    def masked(x_BT: np.ndarray) -> np.ndarray:
        return np.where(mask_BT, x_BT, np.nan).astype(np.float32)

    rollouts = Rollouts(
        mask_BT=mask_BT,
        sampler_logp_BT=masked(sampler_logp_BT),
        old_logp_BT=masked(old_logp_BT),
        reference_logp_BT=masked(reference_logp_BT),
        advantages_B=np.array(ADVANTAGES, np.float32),
    )
    return masked(logp_BT), rollouts, masked(entropy_BT)


def rows(rollouts: Rollouts, part: slice) -> Rollouts:
    """Return some of the sequences."""
    fields = {field.name: getattr(rollouts, field.name) for field in dataclasses.fields(rollouts)}
    return Rollouts(**{name: None if value is None else value[part] for name, value in fields.items()})

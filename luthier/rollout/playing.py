"""An episode in the making: what was drawn and answered so far, and how it stands.

Left out on purpose: when turns are asked for, and of whom (``episodes``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from luthier.rollout.calls import Outcome, described
from luthier.rollout.engine import Completion
from luthier.rollout.environment import Environment, Observation

NO_VERSION = -1
"""Stands for the version of weights where a token was drawn by none."""
_NOTHING_T = np.zeros(0, np.int32)


class Columns(NamedTuple):
    """What is known of each token behind the prompt; see ``episodes.Episode``."""

    tokens_T: np.ndarray
    mask_T: np.ndarray
    logp_T: np.ndarray
    versions_T: np.ndarray


@dataclass
class Playing:
    """Sample ``sample`` of task ``task``.

    ``observation_T`` is what the environment said last; ``cut`` is whether the limit on tokens ended the last turn.
    """

    task: int
    sample: int
    place: str
    environment: Environment | None = None
    own_prompt: list[int] | None = None
    prompt_T: np.ndarray = field(default_factory=lambda: _NOTHING_T)
    observation_T: np.ndarray = field(default_factory=lambda: _NOTHING_T)
    parts: list[Columns] = field(default_factory=list)
    routes_TLk: np.ndarray | None = None
    turns: int = 0
    cut: bool = False
    finish: Literal["stop", "length", "failed"] | None = None
    stopped_by: int | str | None = None
    reward: float | None = None
    failure: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Task and sample."""
        return self.task, self.sample

    @property
    def length(self) -> int:
        """The tokens behind the prompt."""
        return sum(len(part.tokens_T) for part in self.parts)

    @property
    def sequence_T(self) -> np.ndarray:
        """All tokens, from the prompt to the observation."""
        return np.concatenate([self.prompt_T, *(part.tokens_T for part in self.parts), self.observation_T])

    def columns(self) -> Columns:
        """Return what is known of all tokens behind the prompt."""
        empty = Columns(_NOTHING_T, np.zeros(0, bool), np.zeros(0, np.float32), _NOTHING_T)
        return Columns(*(np.concatenate(column) for column in zip(empty, *self.parts, strict=True)))

    def begun(self, outcome: Outcome) -> None:
        """Take what the environment's ``reset`` gave."""
        if outcome.error is not None:
            self.fail(f"at its beginning: {outcome.error}")
            return
        try:
            self.own_prompt = None if outcome.value is None else _tokens(outcome.value).tolist()
            if self.own_prompt == []:
                raise ValueError("a prompt of no tokens")
        except (TypeError, ValueError) as error:
            self.fail(f"at its beginning: {described(error)}")

    def take(self, completion: Completion) -> None:
        """Add a turn of the model."""
        own_T = np.ones(len(completion.tokens_T), bool)
        part = Columns(completion.tokens_T, own_T, completion.softmax_logp_T, completion.versions_T)
        self.parts.append(part)
        self.routes_TLk = completion.routes_TLk  # of earlier turns too: they are part of what it goes on from
        self.turns += 1
        self.stopped_by = completion.stopped_by
        self.cut = completion.finish == "length"

    def answered(self, outcome: Outcome) -> None:
        """Take what the environment's ``step`` gave for the last turn; ``finish`` is set where that was the end."""
        observation, when = outcome.value, f"in turn {self.turns}"
        if outcome.error is not None:
            self.fail(f"{when}: {outcome.error}")
            return
        try:
            if not isinstance(observation, Observation):
                raise TypeError(f"`step` returned {type(observation).__name__}, not an Observation")
            self.observation_T = _tokens(observation.tokens)
            self._add_reward(observation.reward)
        except (TypeError, ValueError) as error:
            self.fail(f"{when}: {described(error)}")
            return
        if self.cut:
            self.finish = "length"
        elif observation.done or not len(self.observation_T):
            self.finish = "stop"

    def go_on(self) -> None:
        """Add the observation, which the next turn goes on from."""
        count = len(self.observation_T)
        zeros_T, none_T = np.zeros(count, np.float32), np.full(count, NO_VERSION, np.int32)
        self.parts.append(Columns(self.observation_T, np.zeros(count, bool), zeros_T, none_T))

    def fail(self, reason: str) -> None:
        """End the episode as failed."""
        name = "environment" if self.environment is None else f"environment `{type(self.environment).__name__}`"
        self.finish, self.reward = "failed", None
        self.failure = f"{self.place}, sample {self.sample + 1}: {name}: {reason}"

    def _add_reward(self, reward: float | None) -> None:
        if reward is None:
            return
        if not math.isfinite(float(reward)):
            raise ValueError(f"a reward of {reward}, which is not finite")
        self.reward = (self.reward or 0.0) + float(reward)


def _tokens(ids: Any) -> np.ndarray:
    """Return token ids as they are kept. Raises ValueError where they are none."""
    ids_T = np.asarray(ids)
    if ids_T.ndim != 1 or (ids_T.size and not np.issubdtype(ids_T.dtype, np.integer)):
        raise ValueError(f"{type(ids).__name__} where a list of token ids should be")
    return ids_T.astype(np.int32)

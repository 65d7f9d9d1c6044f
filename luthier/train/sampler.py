"""A step's completions: sampled, rewarded, and held against each other.

Rewards are computed in processes of their own while the rest is still being sampled. What is kept of them is decided in
the order of the prompts, never in that of their coming, so that a step can be repeated to the bit.

Left out on purpose: training on them (``policy_step``), and when to sample (``feed``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from luthier import processes
from luthier.algorithms import advantages as advantages_lib
from luthier.algorithms.policy import Habits
from luthier.config import RlConfig
from luthier.rollout import episodes as episodes_lib
from luthier.rollout import evaluation, workers
from luthier.rollout.engine import Sampling, SteppedEngine
from luthier.rollout.episodes import Episode, Task
from luthier.rollout.failures import Failure
from luthier.rollout.workers import Scorers
from luthier.train.tasks import Tasks
from luthier.types import Trajectory

ENVIRONMENT = "environment"
"""The name under which an environment's own reward is reported."""
WAIT_SECONDS = 0.01
"""Between two looks at whether rewards are there."""


@dataclass
class Scored:
    """A prompt's G completions with F rewards each; NaN is no reward.

    ``rewards_G`` are the weighted sums, penalties included; ``advantages_G`` are 0 until the whole step is there.
    ``trained_G`` says which completions the policy learns from. ``failures`` are why rewards are missing.
    """

    task: Task
    episodes: Sequence[Episode]
    rewards_GF: np.ndarray
    rewards_G: np.ndarray
    advantages_G: np.ndarray
    trained_G: np.ndarray
    failures: Sequence[Failure] = ()

    def trajectories(self) -> list[Trajectory]:
        """Return the completions that are trained on."""
        return [
            Trajectory(
                prompt_T=episode.prompt_T,
                tokens_T=episode.tokens_T,
                mask_T=episode.mask_T,
                sampler_logp_T=episode.logp_T,
                old_logp_T=episode.logp_T,
                reference_logp_T=None,
                advantage=float(advantage),
                routes_TLk=episode.routes_TLk,
            )
            for episode, advantage, trained in zip(self.episodes, self.advantages_G, self.trained_G, strict=True)
            if trained
        ]


@dataclass(frozen=True)
class Collected:
    """A step's groups, ``kept`` of which are trained on; ``position`` is where the next step's prompts begin.

    ``names`` are the rewards' names, in the order of F.
    """

    number: int
    position: int
    names: tuple[str, ...]
    groups: Sequence[Scored]
    kept: Sequence[Scored]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[Failure]:
        """What went wrong with rewards."""
        return _failures(self.groups)

    @property
    def completions(self) -> int:
        """How many completions were sampled."""
        return sum(len(group.episodes) for group in self.groups)

    @property
    def finite(self) -> bool:
        """Whether all log-probs are numbers."""
        return all(np.isfinite(episode.logp_T).all() for group in self.groups for episode in group.episodes)

    @property
    def rewarded(self) -> bool:
        """Whether any of them has a reward."""
        return any(np.isfinite(group.rewards_G).any() for group in self.groups)

    @property
    def trained(self) -> int:
        """How many of them are trained on."""
        return sum(int(group.trained_G.sum()) for group in self.groups)


@dataclass(frozen=True)
class Sampler:
    """What it takes to collect a step. To be called with the engine's mesh in use.

    All processes call it together, but where the first is ``alone`` and tells the others what came of it.
    """

    config: RlConfig
    engine: SteppedEngine
    tasks: Tasks
    held_out: Tasks | None
    scorers: Scorers
    habits: Habits
    sampling: Sampling
    make_environment: Callable[[], Any] | None
    tokenizer: Any
    mesh: Mesh
    alone: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names."""
        return (*self.scorers.names, *((ENVIRONMENT,) if self.config.environment_rewards else ()))

    def collect(self, number: int, position: int, between: Callable[[], None] | None = None) -> Collected:
        """Sample and reward step ``number``, whose prompts begin at ``position``.

        ``between`` is called between chunks of tokens, and while rewards are waited for.
        """
        wanted, groups = self.config.prompts_per_step, []
        seconds = {"sampling": 0.0, "reward": 0.0}
        tries = 1 + self.config.max_resamples * (self.habits.zero_variance_groups == "resample")
        for _ in range(tries):
            missing = wanted - sum(map(self._keeps, groups))
            if not missing:
                break
            tasks = [self.tasks.at(position + index) for index in range(missing)]
            position += missing
            groups += self._score(tasks, self.config.num_generations, self.sampling, seconds, between)
        kept = [group for group in groups if self._keeps(group)]
        self._compare(kept)
        for group in groups:
            group.trained_G &= self._keeps(group)
        return Collected(number, position, self.names, groups, kept, seconds)

    def evaluate(self, between: Callable[[], None] | None = None) -> tuple[dict[str, float], list[Failure]]:
        """Return what the held-out prompts say of the model, and which rewards failed.

        That is each reward's mean, pass@k and maj@k, and their 95% ends. The same noise is drawn each time, so that two
        evaluations differ by the model alone. ``between`` is called as in ``collect``.
        """
        if self.held_out is None:
            raise RuntimeError("no prompts are held out")
        config = self.config
        temperature = config.temperature if config.eval_temperature is None else config.eval_temperature
        groups = self._score(
            [self.held_out.at(index) for index in range(len(self.held_out))],
            config.eval_num_generations,
            replace(self.sampling, temperature=temperature),
            {"sampling": 0.0, "reward": 0.0},
            between,
        )
        rewards_PGF = np.stack([np.column_stack([each.rewards_GF, each.rewards_G]) for each in groups])
        texts_PG = [[episode.text for episode in each.episodes] for each in groups]
        names = (*(f"rewards/{name}" for name in self.names), "reward")
        found = evaluation.summarise(rewards_PGF, texts_PG, names, threshold=config.pass_threshold, seed=config.seed)
        if len(self.names) == 1:  # then the sum of all is that one
            del found["reward"]
        return _flat(found), _failures(groups)

    def _score(
        self,
        tasks: Sequence[Task],
        samples: int,
        sampling: Sampling,
        seconds: dict[str, float],
        between: Callable[[], None] | None,
    ) -> list[Scored]:
        """Return the groups of these tasks; time taken is added to ``seconds``."""
        started, waiting = time.perf_counter(), {}
        played = episodes_lib.play(
            self.engine,
            tasks,
            samples,
            sampling,
            self.tokenizer,
            make_environment=self.make_environment,
            max_turns=self.config.max_turns,
            continues=not self.config.use_chat_template,
            timeout=self.config.reward_timeout,
            between=between,
        )
        for index, episodes in played:
            waiting[index] = episodes, self.scorers.submit(episodes_lib.group(tasks[index], episodes))
        sampled = time.perf_counter()

        def rewarded() -> list[workers.Scored]:
            return [_result(waiting[index][1], between) for index in range(len(tasks))]

        rewards = rewarded() if self.alone else processes.by_first(rewarded)
        groups = [self._scored(task, waiting[index][0], rewards[index]) for index, task in enumerate(tasks)]
        seconds["sampling"] += sampled - started
        seconds["reward"] += time.perf_counter() - sampled
        return groups

    def _scored(self, task: Task, played: Sequence[Episode], scored: workers.Scored) -> Scored:
        rewards_GF = scored.rewards_GF
        if self.config.environment_rewards:
            own_G1 = np.array([[math.nan if each.reward is None else each.reward] for each in played])
            rewards_GF = np.concatenate([rewards_GF, own_G1], axis=1)
        failed_G1 = np.array([[each.failed] for each in played])
        rewards_GF = np.where(failed_G1, math.nan, rewards_GF)  # what an environment broke off is no one's to judge
        weights_F = np.array(self.config.reward_weights or [1.0] * rewards_GF.shape[1])
        rewards_G = advantages_lib.total(rewards_GF, weights_F)
        truncated_G = np.array([each.finish == "length" for each in played])
        if self.habits.truncated_completions == "penalize":
            limit = self.config.max_new_tokens
            lengths_G = np.array([len(each.tokens_T) for each in played])
            buffer = self.config.overlong_buffer or max(1, limit // 5)
            rewards_G = rewards_G + advantages_lib.overlong_penalty(lengths_G, limit, buffer)
        masked_G = truncated_G if self.habits.truncated_completions == "mask" else np.zeros_like(truncated_G)
        broken = [Failure(ENVIRONMENT, task.prompt.place, each.failure, 1) for each in played if each.failure]
        return Scored(
            task,
            played,
            rewards_GF,
            rewards_G,
            advantages_G=np.zeros_like(rewards_G),
            trained_G=np.isfinite(rewards_G) & ~masked_G,
            failures=(*scored.failures, *broken),
        )

    def _keeps(self, group: Scored) -> bool:
        return self.habits.zero_variance_groups == "keep" or not is_flat(group)

    def _compare(self, kept: Sequence[Scored]) -> None:
        """Give each completion its advantage."""
        if kept:
            rewards_PG = np.stack([group.rewards_G for group in kept])
            advantages_PG = advantages_lib.advantages(rewards_PG, self.habits.advantages)
            for group, advantages_G in zip(kept, advantages_PG, strict=True):
                group.advantages_G = advantages_G


def _result(pending: workers.Pending, between: Callable[[], None] | None) -> workers.Scored:
    """Wait for the rewards of a group."""
    while between is not None and not pending.done():
        between()
        time.sleep(WAIT_SECONDS)
    return pending.result()


def is_flat(group: Scored) -> bool:
    """Say whether the rewards of a group are all alike, so that it teaches nothing."""
    return bool(advantages_lib.zero_variance(group.rewards_G[None])[0])


def measures(collected: Collected) -> dict[str, float]:
    """Return the numbers of a step's completions, under the names they are logged by."""
    rewards_PG = np.stack([group.rewards_G for group in collected.groups])
    every_NF = np.concatenate([group.rewards_GF for group in collected.groups])
    played = [episode for group in collected.groups for episode in group.episodes]
    lengths_N = np.array([len(episode.tokens_T) for episode in played])
    own_N = np.array([int(episode.mask_T.sum()) for episode in played])
    found = {
        "reward": _mean(rewards_PG),
        "reward_std": _mean([np.nanstd(rewards_G) for rewards_G in rewards_PG if np.isfinite(rewards_G).any()]),
        "frac_reward_zero_std": float(np.mean([is_flat(group) for group in collected.groups])),
        "num_groups": len(collected.kept),
        "num_tokens": int(lengths_N.sum() + sum(len(group.task.ids) for group in collected.groups)),
        "num_sampled_tokens": int(own_N.sum()),
        "completions/mean_length": float(lengths_N.mean()),
        "completions/min_length": int(lengths_N.min()),
        "completions/max_length": int(lengths_N.max()),
        "completions/clipped_ratio": float(np.mean([episode.finish == "length" for episode in played])),
        "completions/mean_turns": float(np.mean([episode.turns for episode in played])),
        "rewards/missing": float(np.isnan(every_NF).mean()) if every_NF.size else 0.0,
        "rewards/failed": sum(failure.lost for failure in collected.failures),
    }
    for name, values_N in zip(collected.names, every_NF.T, strict=True):
        found[f"rewards/{name}/mean"] = _mean(values_N)
        found[f"rewards/{name}/std"] = float(np.nanstd(values_N)) if np.isfinite(values_N).any() else 0.0
    return found


def _failures(groups: Sequence[Scored]) -> list[Failure]:
    return [failure for group in groups for failure in group.failures]


def _mean(values: Any) -> float:
    """Return the mean of what is known, 0 where nothing is."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else 0.0


def _flat(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return an evaluation's numbers under the names they are logged by."""
    flat = {}
    for name, measured in found.items():
        for measure, value in measured.items():
            if not isinstance(value, Mapping):
                flat[f"{name}/{measure}"] = float(value)
                continue
            flat[f"{name}/{measure}"] = value["value"]
            flat[f"{name}/{measure}/low"], flat[f"{name}/{measure}/high"] = value["low"], value["high"]
    return flat

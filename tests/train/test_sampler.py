"""What becomes of a step's completions: which are kept, masked, punished, and what they are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from luthier import config
from luthier.rollout import workers
from luthier.rollout.engine import Sampling
from luthier.rollout.episodes import Episode, Task
from luthier.rollout.failures import Failure
from luthier.rollout.prompts import Prompt
from luthier.train import rl_plan, sampler
from luthier.train.sampler import Collected, Sampler
from luthier.train.tasks import Tasks

LIMIT = 10


def episode(length: int = 3, finish: str = "stop", reward: float | None = None, failure: str | None = None) -> Episode:
    tokens_T = np.arange(length, dtype=np.int32)
    return Episode(
        prompt_T=np.array([1, 2], np.int32),
        tokens_T=tokens_T,
        mask_T=np.ones(length, bool),
        logp_T=np.full(length, -1.0, np.float32),
        versions_T=np.zeros(length, np.int32),
        text="text",
        turns=1,
        finish="failed" if failure else finish,  # type: ignore[arg-type]
        reward=reward,
        failure=failure,
    )


@dataclass
class Told:
    """Scorers that give what they were told: for the prompt of each place, rewards ``[G, F]`` and failures."""

    rewards: dict[str, Sequence[Sequence[float]]]
    names: tuple[str, ...] = ("one",)
    failed: Sequence[Failure] = ()
    asked: list[str] = field(default_factory=list)

    def submit(self, group: Any) -> Any:
        self.asked.append(group.place)
        scored = workers.Scored(np.array(self.rewards[group.place], float), tuple(self.failed))
        return SimpleNamespace(result=lambda: scored, done=lambda: True)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a Sampler of two completions a prompt, which draws given episodes."""

    def made(scorers: Told, episodes: Sequence[Episode] | None = None, **keys: Any) -> Any:
        def play(engine: Any, tasks: Sequence[Task], samples: int, *_: Any, **__: Any) -> Iterator[Any]:
            played = list(episodes or [episode()] * samples)
            yield from ((index, played) for index in reversed(range(len(tasks))))  # in whatever order they end

        monkeypatch.setattr(sampler.episodes_lib, "play", play)
        monkeypatch.setattr(sampler.episodes_lib, "group", lambda task, played: task.prompt)
        chosen = {"load_parameters_path": "tiny", "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": LIMIT}
        read = config.RlConfig(**(chosen | keys))
        names = sorted(scorers.rewards)
        prompts = [Prompt(name, ({"role": "user", "content": name},), name) for name in names]
        tasks = Tasks(prompts, [[1, 2]] * len(prompts), 0, False)
        habits = rl_plan.habits(read)
        return Sampler(read, None, tasks, None, scorers, habits, Sampling(), None, None, None)  # type: ignore[arg-type]

    return made


FLAT, VARIED = [[1.0], [1.0]], [[0.0], [1.0]]


def places(collected: Collected, kept: bool = False) -> list[str]:
    return [group.task.prompt.place for group in (collected.kept if kept else collected.groups)]


@pytest.mark.parametrize(
    ("keys", "seen", "kept", "position"),
    [
        ({}, "ab", "ab", 2),
        ({"zero_variance_groups": "drop"}, "ab", "b", 2),
        ({"zero_variance_groups": "resample"}, "abcd", "bd", 4),
        ({"zero_variance_groups": "resample", "max_resamples": 1}, "abc", "b", 3),
        ({"zero_variance_groups": "resample", "max_resamples": 0}, "ab", "b", 2),
        ({"loss_algo": "dapo"}, "abcd", "bd", 4),
    ],
    ids=str,
)
def test_groups_without_variance_are_kept_dropped_or_sampled_anew(make, keys, seen, kept, position) -> None:
    told = Told({"a": FLAT, "b": VARIED, "c": FLAT, "d": VARIED})
    collected = make(told, **keys).collect(1, 0)
    assert "".join(places(collected)) == seen
    assert "".join(places(collected, kept=True)) == kept
    assert collected.position == position
    for group in collected.groups:
        assert group.trained_G.all() == (group.task.prompt.place in kept)
    numbers = sampler.measures(collected)
    assert numbers["frac_reward_zero_std"] == sum(place in "ac" for place in seen) / len(seen)
    assert numbers["num_groups"] == len(kept)
    trajectories = [one for group in collected.kept for one in group.trajectories()]
    assert len(trajectories) == collected.trained == 2 * len(kept)


def test_the_next_step_begins_where_resampling_ended(make) -> None:
    told = Told({"a": FLAT, "b": VARIED, "c": VARIED, "d": VARIED})
    collecting = make(told, zero_variance_groups="resample")
    first = collecting.collect(1, 0)
    assert "".join(places(collecting.collect(2, first.position))) == "dab"  # "a" is flat again, and "b" comes in for it


def test_where_all_groups_are_flat_the_tries_end_and_nothing_is_trained(make) -> None:
    told = Told(dict.fromkeys("abcd", FLAT))
    collected = make(told, zero_variance_groups="resample", max_resamples=3).collect(1, 0)
    assert len(told.asked) == 8
    assert not collected.kept
    assert not collected.trained
    assert collected.rewarded


@pytest.mark.parametrize(
    ("keys", "rewards", "trained"),
    [
        ({}, [1.0, 2.0], [True, True]),
        ({"truncated_completions": "mask"}, [1.0, 2.0], [True, False]),
        ({"truncated_completions": "penalize"}, [1.0 - 0.5, 2.0 - 1.0], [True, True]),
        ({"truncated_completions": "penalize", "overlong_buffer": 4}, [1.0 - 0.75, 2.0 - 1.0], [True, True]),
    ],
    ids=str,
)
def test_truncated_completions(make, keys, rewards, trained) -> None:
    episodes = [episode(9), episode(LIMIT, "length")]
    told = Told({"a": [[1.0], [2.0]], "b": VARIED})
    group = make(told, episodes, **keys).collect(1, 0).groups[0]
    np.testing.assert_allclose(group.rewards_G, rewards)
    assert group.trained_G.tolist() == trained
    assert len(group.trajectories()) == sum(trained)
    assert np.abs(group.advantages_G).min() > 0  # whoever is masked still counts for the others


def test_a_penalty_over_a_fifth_of_very_few_tokens(make) -> None:
    told = Told({"a": VARIED, "b": VARIED})
    keys = {"truncated_completions": "penalize", "max_new_tokens": 3}
    group = make(told, [episode(2), episode(3, "length")], **keys).collect(1, 0).groups[0]
    np.testing.assert_allclose(group.rewards_G, [0.0, 0.0])


def test_rewards_are_weighed_and_none_is_left_out(make) -> None:
    told = Told({"a": [[1.0, 2.0], [math.nan, 3.0]], "b": [[math.nan, math.nan], [1.0, math.nan]]}, ("one", "two"))
    weighed = make(told, reward_functions=["x.one", "x.two"], reward_weights=[10, 1]).collect(1, 0)
    np.testing.assert_allclose(weighed.groups[0].rewards_G, [12.0, 3.0])
    np.testing.assert_allclose(weighed.groups[1].rewards_G, [math.nan, 10.0])
    assert weighed.groups[1].trained_G.tolist() == [False, True]
    numbers = sampler.measures(weighed)
    assert numbers["reward"] == pytest.approx(25 / 3)
    assert numbers["rewards/one/mean"] == 1.0
    assert numbers["rewards/two/mean"] == 2.5
    assert numbers["rewards/missing"] == 0.5


def test_failures_are_told_by_group_and_counted(make) -> None:
    failure = Failure("one", "a", "failed: it did", 2)
    told = Told({"a": VARIED, "b": VARIED}, failed=[failure])
    collected = make(told).collect(1, 0)
    assert collected.groups[0].failures == (failure,)
    assert collected.failures == [failure, failure]
    assert sampler.measures(collected)["rewards/failed"] == 4


def test_a_completion_that_its_environment_broke_off_has_no_reward(make) -> None:
    told = Told({"a": [[1.0], [1.0], [0.0]], "b": [[1.0], [1.0], [0.0]]})
    episodes = [episode(failure="it broke"), episode(reward=2.0), episode(reward=1.0)]
    collected = make(told, episodes, environment="mine.py:Mine", num_generations=3).collect(1, 0)
    group = collected.groups[0]
    np.testing.assert_allclose(group.rewards_GF, [[math.nan, math.nan], [1.0, 2.0], [0.0, 1.0]])
    np.testing.assert_allclose(group.rewards_G, [math.nan, 3.0, 1.0])
    assert group.trained_G.tolist() == [False, True, True]
    assert group.advantages_G[0] == 0
    assert collected.names == ("one", "environment")
    assert [failure.function for failure in group.failures] == ["environment"]

"""Episodes on the embedded engine: their numbers, their order, their ends, and what environments may do to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh
from luthier.config import EngineKeys, ModelKeys
from luthier.data.chat import Rendering
from luthier.errors import UserError
from luthier.model import param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.rollout import episodes
from luthier.rollout.calculator import Calculator
from luthier.rollout.calls import Calls
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.environment import Edge, Observation, SingleTurn
from luthier.rollout.episodes import Episode, Task
from luthier.rollout.local import LocalEngine
from luthier.rollout.prompts import Prompt
from luthier.types import Batch

MODEL = Model.from_hf(tiny.TINY | {"vocab_size": 272}, "tiny")
WORDS = tiny.tokenizer()
EDGE = Edge(WORDS, Rendering(), (WORDS.eos_token_id,))
HERE = mesh.make(ModelKeys(), jax.devices()[:1])
KEYS = EngineKeys(max_num_seqs=8, prefill_chunk_length=16, decode_steps=3, max_target_length=96)
STOPS = tuple(range(0, 272, 8))
HOW = Sampling(max_new_tokens=30, stop_token_ids=STOPS)


@pytest.fixture(autouse=True)
def _mesh() -> Iterator[None]:
    with mesh.use(HERE):
        yield


def weights(seed: int = 1, sharper: float = 3.0) -> Any:
    params = param.initialise(MODEL.spec, jax.random.key(seed), jnp.float32, HERE)
    return jax.tree.map(lambda w: w * sharper if w.ndim > 1 else w, params)


PARAMS = weights()


def engine(keys: EngineKeys = KEYS) -> LocalEngine:
    made = LocalEngine(MODEL, PARAMS, Compute(), HERE, keys, tokenizer=WORDS, context_length=512)
    made.reserve(8, 96)
    return made


def tasks(count: int, seed: int = 0) -> list[Task]:
    random = np.random.default_rng(seed)
    listed = []
    for number in range(count):
        ids = random.integers(0, 272, random.integers(20, 40)).tolist()
        prompt = Prompt(f"row {number + 1}", ({"role": "user", "content": "?"},), "?", row={"number": number})
        listed.append(Task(prompt, ids, seed=1000 * seed + number))
    return listed


Played = dict[int, list[Episode]]


def played(
    made: Any, asked: list[Task], samples: int = 3, how: Sampling = HOW, **more: Any
) -> dict[int, list[Episode]]:
    return dict(episodes.play(made, asked, samples, how, WORDS, **more))


def same(one: Played, other: Played, atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for index, group in one.items():
        for a, b in zip(group, other[index], strict=True):
            assert a.tokens_T.tolist() == b.tokens_T.tolist()
            np.testing.assert_array_equal(a.mask_T, b.mask_T)
            np.testing.assert_allclose(a.logp_T, b.logp_T, rtol=0, atol=atol)
            assert (a.finish, a.turns, a.reward, a.text) == (b.finish, b.turns, b.reward, b.text)


LOGITS = jax.jit(lambda params, batch: MODEL.logits(params, batch, Compute()))


def scored(episode: Episode, temperature: float = 1.0, params: Any = PARAMS) -> np.ndarray:
    """Return the log-probs of all tokens behind the prompt by one pass over everything."""
    whole = np.concatenate([episode.prompt_T, episode.tokens_T])
    ids = np.zeros((1, 96), np.int32)
    ids[0, : len(whole)] = whole
    segments = (np.arange(96) < len(whole)).astype(np.int32)[None]
    batch = Batch(ids, np.arange(96, dtype=np.int32)[None], segments, ids > 0)
    logp_TV = jax.nn.log_softmax(np.asarray(LOGITS(params, batch), np.float32)[0] / temperature)
    start = len(episode.prompt_T)
    return np.asarray(logp_TV)[np.arange(start - 1, len(whole) - 1), whole[start:]]


class Numbers:
    """Answers each turn with a number of tokens that follow from the turn, some turns long."""

    stop: tuple[str, ...] = ()
    quick = True
    turns = 3

    def reset(self, prompt):
        self.count = 0

    def step(self, tokens_T):
        self.count += 1
        if self.count == self.turns:
            return Observation(reward=float(len(tokens_T)), done=True)
        return Observation([7, int(tokens_T[-1]), 9, 11][: 1 + len(tokens_T) % 4], reward=0.5)


class Slow(Numbers):
    quick = False

    def step(self, tokens_T):
        time.sleep(0.03 * ((int(tokens_T.sum()) + self.count) % 3))
        return super().step(tokens_T)


def test_single_turns_are_the_completions_of_the_engine():
    asked, how = tasks(5), replace(HOW, max_new_tokens=8)
    found = played(engine(), asked, how=how)
    requests = [Request(task.ids, 3, replace(how, seed=task.seed)) for task in asked]
    for completion in engine().generate(requests):
        episode = found[completion.request][completion.sample]
        assert episode.tokens_T.tolist() == completion.tokens_T.tolist()
        np.testing.assert_array_equal(episode.logp_T, completion.softmax_logp_T)
        assert (episode.finish, episode.stopped_by) == (completion.finish, completion.stopped_by)
        assert (episode.turns, episode.reward, episode.failed) == (1, None, False)
        assert episode.mask_T.all()
        assert not episode.versions_T.any()
        ended = completion.stopped_by is not None
        assert episode.text == WORDS.decode(completion.tokens_T[:-1] if ended else completion.tokens_T, True)
    assert {episode.finish for group in found.values() for episode in group} == {"stop", "length"}


@pytest.mark.parametrize("make", [None, Numbers])
def test_the_same_to_the_bit_whatever_the_engine_did_before(make):
    asked = tasks(6)
    first = played(engine(), asked, make_environment=make)
    used = engine()
    played(used, tasks(9, seed=5), how=Sampling(max_new_tokens=17, temperature=0.7))
    # What rows hold of these would be gone on from, in other rows and in pieces of other sizes.
    played(used, [replace(task, ids=task.ids[:18]) for task in reversed(asked)], samples=1)
    stream = episodes.play(used, [*asked, *tasks(3, seed=2)], 2, HOW, WORDS)
    next(stream)
    stream.close()
    same(first, played(used, asked, make_environment=make))
    used.sync(PARAMS, version=3)
    again = played(used, asked, make_environment=make)
    same(first, again)
    assert {int(v) for group in again.values() for each in group for v in each.versions_T[each.mask_T]} == {3}


def test_turns_are_scored_as_one_pass_over_everything_scores_them():
    how = Sampling(max_new_tokens=30, stop_token_ids=STOPS, temperature=0.8)
    found = played(engine(), tasks(6), how=how, make_environment=Numbers)
    several = [episode for group in found.values() for episode in group if episode.turns > 1]
    assert len(several) > 9
    for episode in several:
        assert len(episode.tokens_T) <= 30
        np.testing.assert_allclose(episode.logp_T[episode.mask_T], scored(episode, 0.8)[episode.mask_T], atol=1e-4)
        assert not episode.logp_T[~episode.mask_T].any()
        assert set(episode.versions_T[~episode.mask_T].tolist()) == {-1}
        assert set(episode.versions_T[episode.mask_T].tolist()) == {0}
        turns = np.split(episode.mask_T, np.flatnonzero(np.diff(episode.mask_T.astype(int))) + 1)
        assert len(turns) == 2 * episode.turns - 1
        assert episode.mask_T[-1]
        if episode.finish == "stop":
            assert episode.turns == 3
            assert episode.reward == 1.0 + turns[-1].sum()
        else:
            assert len(episode.tokens_T) > 24 or episode.turns < 3


def test_slow_environments_change_nothing_but_rounding():
    asked = tasks(4)
    same(played(engine(), asked, make_environment=Numbers), played(engine(), asked, make_environment=Slow), atol=1e-5)


def test_the_engine_goes_on_while_an_environment_is_slow():
    class Sleeps(SingleTurn):
        quick = False

        def step(self, tokens_T):
            time.sleep(0.3)
            return Observation(done=True)

    asked = tasks(6)
    played(engine(), asked[:1])
    started = time.perf_counter()
    played(engine(), asked, make_environment=Sleeps)
    assert time.perf_counter() - started < 18 * 0.3 / 2


def test_a_prompt_is_read_once_for_its_group_and_a_turn_goes_on_in_its_row(monkeypatch):
    made = engine()
    read: list[int] = []
    prefill = made._prefill
    monkeypatch.setattr(
        made, "_prefill", lambda items, *rest: (read.extend(len(i[1]) for i in items), prefill(items, *rest))
    )
    asked = tasks(4)
    found = played(made, asked, samples=4, make_environment=Numbers)
    answers = sum(int((~episode.mask_T).sum()) for group in found.values() for episode in group)
    # Each piece of a prompt over 16 tokens counts whole, since only its first 16 are read in that call.
    prompts = sum(len(task.ids) - 1 + max(0, len(task.ids) - 17) + max(0, len(task.ids) - 33) for task in asked)
    assert answers > 0
    assert sum(read) == prompts + answers


def test_groups_come_as_they_are_done_and_tasks_are_taken_as_they_are_wanted():
    taken = []

    def endless():
        for task in tasks(50):
            taken.append(task)
            yield task

    stream = episodes.play(engine(), endless(), 2, HOW, WORDS, ahead=3)
    seen = [next(stream)[0] for _ in range(4)]
    assert len(set(seen)) == 4
    assert len(taken) <= 7
    stream.close()


def test_closing_frees_the_engine():
    made = engine()
    stream = episodes.play(made, tasks(8), 4, HOW, WORDS)
    next(stream)
    with pytest.raises(RuntimeError, match="busy"):
        next(episodes.play(made, tasks(1), 1, HOW, WORDS))
    stream.close()
    assert not made.busy


def test_weights_may_change_between_steps():
    made, other = engine(), weights(2)
    calls = 0

    def between():
        nonlocal calls
        calls += 1
        if calls == 4:
            made.sync(other, version=8)

    how = Sampling(max_new_tokens=24)
    found = played(made, tasks(2), 2, how, between=between)
    old = played(engine(), tasks(2), 2, how)
    assert calls == 8
    for index, group in found.items():
        for episode, unchanged in zip(group, old[index], strict=True):
            assert episode.versions_T.tolist() == [0] * 9 + [8] * 15
            assert episode.tokens_T[:9].tolist() == unchanged.tokens_T[:9].tolist()
            np.testing.assert_array_equal(episode.logp_T[:9], unchanged.logp_T[:9])
            assert not np.allclose(episode.logp_T[9:], unchanged.logp_T[9:], atol=1e-2)


@pytest.mark.parametrize("turns", [1, 2])
def test_turns_are_bounded(turns):
    class Endless(Numbers):
        turns = 100

    found = played(engine(), tasks(3), make_environment=Endless, max_turns=turns)
    every = [episode for group in found.values() for episode in group]
    assert max(episode.turns for episode in every) == turns
    assert {episode.finish for episode in every} == {"length"}
    assert all(len(episode.tokens_T) <= 30 and episode.mask_T[-1] for episode in every)


def test_the_cache_s_end_is_a_limit_too():
    class Long(Numbers):
        def step(self, tokens_T):
            return Observation([5] * 40)

    found = played(engine(), tasks(3), 2, Sampling(max_new_tokens=200, stop_token_ids=STOPS), make_environment=Long)
    for group in found.values():
        for episode in group:
            assert episode.finish == "length"
            assert len(episode.prompt_T) + len(episode.tokens_T) <= 96


class Broken(Numbers):
    """Fails for sample 2 of a task, in the way that the row's number says."""

    made = 0
    quick = False

    def __init__(self):
        type(self).made += 1
        self.bad = type(self).made % 3 == 2
        if self.bad and type(self).made == 20:
            raise OSError("no room")

    def reset(self, prompt):
        super().reset(prompt)
        self.how = prompt.row["number"] if self.bad else -1
        if self.how == 0:
            raise ValueError("no start")
        return [3, 4, 5] if self.how == 1 else None

    def step(self, tokens_T):
        if self.how == 2:
            raise KeyError("no step")
        if self.how == 3:
            raise SystemExit(3)
        if self.how == 4:
            time.sleep(5)
        return {5: "done", 7: Observation([99999]), 8: Observation(reward=float("nan"))}.get(
            self.how, Observation(reward=1.0, done=True)
        )


def test_a_failing_environment_costs_its_episode_alone():
    Broken.made = 0
    started = time.perf_counter()
    how = Sampling(max_new_tokens=60, stop_token_ids=STOPS)
    found = played(engine(), tasks(9), how=how, make_environment=Broken, timeout=1.0, workers=8)
    assert time.perf_counter() - started < 20
    said = ["ValueError: no start", "another prompt", "KeyError: 'no step'", "SystemExit: 3", "TimeoutError: not back",
            "`step` returned str", "OSError: no room", "token 99999", "not finite"]  # fmt: skip
    for index, words in enumerate(said):
        good, bad, other = found[index]
        assert words in bad.failure, bad.failure
        assert bad.failure.startswith(f"row {index + 1}, sample 2: environment")
        assert (bad.failed, bad.finish, bad.reward) == (True, "failed", None)
        for episode in (good, other):
            assert (episode.failed, episode.reward) == (False, 1.0)
    assert "test_episodes.py, line" in found[0][1].failure
    unbroken = played(engine(), tasks(9), how=how)
    assert found[2][2].tokens_T.tolist() == unbroken[2][2].tokens_T.tolist()


def test_a_group_of_which_nothing_is_left_comes_out_too():
    class Never(SingleTurn):
        def reset(self, prompt):
            raise ValueError("never")

    found = played(engine(), tasks(2), make_environment=Never)
    assert [[len(each.tokens_T) for each in group] for group in found.values()] == [[0] * 3] * 2


def test_an_own_prompt_is_asked_in_place_of_the_row_s():
    class Own(SingleTurn):
        def reset(self, prompt):
            return [5, 6, 7, prompt.row["number"]]

    found = played(engine(), tasks(2), make_environment=Own)
    for index, group in found.items():
        for episode in group:
            assert episode.prompt_T.tolist() == [5, 6, 7, index]
            np.testing.assert_allclose(episode.logp_T, scored(episode), atol=1e-4)

    class Long(SingleTurn):
        def reset(self, prompt):
            return [5] * 500

    found = played(engine(), tasks(1), make_environment=Long)
    assert all("its prompt cannot be served" in episode.failure for episode in found[0])


def test_a_task_that_cannot_be_served_is_named():
    long = Task(tasks(1)[0].prompt, [5] * 200, 0)
    with pytest.raises(UserError, match="row 1: the prompt has 200 tokens"):
        played(engine(), [long])


class Scripted:
    """An engine that says what it is told to, whole turns at a time."""

    length = None

    def __init__(self, turns: list[str]) -> None:
        self.turns, self.asked, self.waiting = turns, [], []

    busy = property(lambda self: bool(self.waiting))
    forget = cancel = lambda *_: None

    def submit(self, request: Request, *, first: bool = False) -> int:
        self.asked.append(request)
        self.waiting.append(len(self.asked) - 1)
        return self.waiting[-1]

    def step(self) -> list[Any]:
        number = self.waiting.pop(0)
        ids = np.array(WORDS(self.turns[number])["input_ids"], np.int32)
        zeros_T = np.zeros(len(ids), np.float32)
        stopped = WORDS.eos_token_id if ids[-1] == WORDS.eos_token_id else "</calc>"
        return [Completion(number, 0, ids, zeros_T, zeros_T, np.zeros_like(ids), "stop", stopped)]


def test_the_calculator_in_an_episode():
    said = ["I compute <calc>12*7</calc>", " and <calc>84/0</calc>", " so it is #### 84<|im_end|>"]
    made, task = Scripted(said), tasks(1)[0]
    how = Sampling(max_new_tokens=200, stop_token_ids=(WORDS.eos_token_id,))
    found = played(made, [task], 1, how, make_environment=lambda: Calculator(EDGE, instructions=""))
    (episode,) = found[0]
    results = ["<result>84</result>", "<result>error: division by zero</result>"]
    assert episode.text == f"{said[0]}{results[0]}{said[1]}{results[1]}{said[2]}".removesuffix("<|im_end|>")
    assert (episode.turns, episode.finish, episode.stopped_by) == (3, "stop", WORDS.eos_token_id)
    assert WORDS.decode(episode.tokens_T[~episode.mask_T]) == "".join(results)
    assert [request.sampling.stop for request in made.asked] == [("</calc>",)] * 3
    assert [request.samples for request in made.asked] == [1] * 3
    lengths = [len(request.prompt) for request in made.asked]
    assert [request.sampling.max_new_tokens for request in made.asked] == [200 - n + lengths[0] for n in lengths]
    assert len({request.sampling.seed for request in made.asked}) == 3
    group = episodes.group(task, found[0])
    assert (group.completions, group.place) == ([episode.text], "row 1")


def test_calls_are_so_many_at_a_time():
    running, most = 0, 0

    def work() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return 1

    calls = Calls(workers=3, seconds=10)
    for key in range(10):
        calls.submit(key, work, here=False)
    done: list[int] = []
    while len(done) < 10:
        done += [key for key, outcome in calls.collect(wait=True) if outcome.value == 1]
    assert sorted(done) == list(range(10))
    assert most == 3
    assert calls.collect(wait=True) == []


def test_what_the_other_processes_cannot_be_told_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.processes.several", lambda: True)
    calls = Calls(workers=1, seconds=10, shared=True)
    calls.submit(0, lambda: (token for token in (1, 2)), here=True)
    calls.submit(1, lambda: [1, 2], here=False)
    found = dict(calls.collect(wait=True))
    found |= dict(calls.collect(wait=True)) if len(found) < 2 else {}
    assert "cannot pickle 'generator' object" in (found[0].error or "")
    assert found[1] == ([1, 2], None)

"""The vLLM engine over servers that do as they should: what is asked of whom, with which weights and noise."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from fake import LONGEST, VOCAB
from fleets import STOPS, Names, Together, check_right, drain, engine, requests, seed_of, until

import tiny
from luthier import processes
from luthier.errors import RunError, UserError
from luthier.rollout import episodes
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.episodes import Task
from luthier.rollout.prompts import Prompt


def test_each_sample_is_what_its_seed_draws(fakes):
    asked = requests(3, samples=4)
    with engine(fakes(2), version=3) as found:
        done = list(found.generate(asked))
        again = list(found.generate(asked))
    check_right(done, asked, versions={3})
    drawn = {(each.request, each.sample): tuple(each.tokens_T.tolist()) for each in done}
    assert drawn == {(each.request, each.sample): tuple(each.tokens_T.tolist()) for each in again}
    assert len(set(drawn.values())) == 12  # no two share their noise


def test_without_a_seed_the_noise_is_new_each_time_and_follows_from_the_engines(fakes):
    servers = fakes(1)
    for _ in range(2):
        with engine(servers, seed=9) as found:
            for _ in range(2):
                list(found.generate([Request([7], 1, Sampling(max_new_tokens=2))]))
    first, second, again, then = [each["sampling_params"]["seed"] for each in servers[0].asked]
    assert (first, second) == (again, then)
    assert first != second
    assert all(0 <= seed < 2**63 for seed in (first, second))


def test_a_request_says_all_that_is_wanted_and_leaves_nothing_to_the_server(fakes):
    servers = fakes(1)
    sampling = Sampling(0.7, 5, 0.9, 0.01, 6, STOPS, seed=100)
    with engine(servers, Names(adapter="policy")) as found:
        (done,) = found.generate([Request([7, 8, 0], 1, sampling)])
    (asked,) = servers[0].asked
    told = asked["sampling_params"]
    assert (asked["token_ids"], asked["model"]) == ([7, 8, 0], "policy")
    expected = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "max_tokens": 6, "seed": seed_of(100, 0)}
    assert {name: told[name] for name in expected} == expected
    assert (told["n"], told["ignore_eos"], told["stop_token_ids"]) == (1, True, list(STOPS))
    assert np.isnan(done.softmax_logp_T).all()  # of filtered tokens the server cannot say
    assert np.isfinite(done.logp_T).all()


def test_completions_are_cut_at_the_length_and_longer_prompts_refused(fakes):
    with engine(fakes(1), length=20) as found:
        assert found.length == 20
        (done,) = found.generate([Request([7] * 15, 1, Sampling(max_new_tokens=100))])
        assert (len(done.tokens_T), done.finish) == (5, "length")
        with pytest.raises(UserError, match="20"):
            found.submit(Request([7] * 20))


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request([VOCAB]), "vocabulary"),
        (Request([7], adapter="other"), "adapter=other"),
        (Request([7], sampling=Sampling(temperature=0.005)), "temperature=0.005"),
        (Request([7], sampling=Sampling(logprobs=2, top_k=3)), "logprobs=2"),
        (Request([7], sampling=Sampling(stop=("x",))), "tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_asked(fakes, request_, match):
    servers = fakes(1)
    with engine(servers) as found:
        with pytest.raises(UserError, match=match):
            found.generate([Request([7]), request_])
        assert not found.busy
    assert not servers[0].asked


def test_load_goes_where_least_is_under_way(fakes):
    servers = fakes(3, seconds_a_token=0.1)
    with engine(servers) as found:
        found.submit(requests(1, samples=12, limit=100, stop_token_ids=())[0])
        until(lambda: sum(each.draws for each in servers) == 12)
        assert [each.draws for each in servers] == [4, 4, 4]


def test_a_slow_server_is_asked_for_less(fakes, monkeypatch):
    monkeypatch.setattr("luthier.rollout.vllm.asking.MOST_AT_ONCE", 2)
    fast, slow = fakes(1)[0], fakes(1, seconds_a_token=0.03)[0]
    with engine([fast, slow]) as found:
        asked = requests(10, samples=4)
        check_right(list(found.generate(asked)), asked, versions={0})
    assert len(fast.asked) > 2 * len(slow.asked) > 0


def test_first_requests_go_before_what_waits(fakes, monkeypatch):
    monkeypatch.setattr("luthier.rollout.vllm.asking.MOST_AT_ONCE", 1)
    servers = fakes(1, seconds_a_token=0.01)
    with engine(servers) as found:
        asked = requests(4, samples=1, stop_token_ids=())
        numbers = [found.submit(each) for each in asked[:3]]
        numbers.append(found.submit(asked[3], first=True))
        done = drain(found)
    check_right(done, asked, versions={0}, numbers=numbers)
    assert [each["token_ids"][2] for each in servers[0].asked] == [0, 3, 1, 2]


def test_new_weights_are_taken_in_the_middle_of_completions(fakes):
    servers, send = fakes(2, seconds_a_token=0.01), Names()
    with engine(servers, send) as found:
        asked = requests(2, samples=4, limit=40, stop_token_ids=())
        numbers = [found.submit(each) for each in asked]
        until(lambda: sum(each.draws for each in servers) == 8)
        time.sleep(0.05)
        found.sync("newer", 4)
        done = drain(found)
    check_right(done, asked, versions={0, 4}, numbers=numbers)
    assert all(set(each.versions_T.tolist()) == {0, 4} for each in done)
    assert all((np.diff(each.versions_T) >= 0).all() for each in done)
    assert send.sent == [("params", 0, 0, 2), ("newer", 4, 2, 0)]
    assert all(each.versions == ["0", "4"] for each in servers)


def test_interrupted_completions_begin_again_where_they_are_dropped(fakes):
    servers = fakes(2, seconds_a_token=0.01)
    with engine(servers, Names(pause_mode="abort")) as found:
        asked = requests(2, samples=4, limit=30, stop_token_ids=())
        numbers = [found.submit(each) for each in asked]
        until(lambda: sum(each.draws for each in servers) == 8)
        found.sync("newer", 1)
        done = drain(found)
    check_right(done, asked, versions={1}, numbers=numbers)
    names = [each["request_id"] for server in servers for each in server.asked]
    assert len(names) == len(set(names)) == 16  # no id is used twice


def test_pieces_are_of_one_version_each_and_make_up_the_completions(fakes):
    servers = fakes(1, seconds_a_token=0.01)
    with engine(servers) as found:
        number = found.submit(requests(1, samples=1, limit=30, stop_token_ids=())[0])
        until(lambda: servers[0].draws == 1)
        time.sleep(0.05)
        found.sync("newer", 1)
        events = []
        while found.busy:
            events += found.step()
    *pieces, done = events
    assert [piece.version for piece in pieces] == [0, 1]
    assert (done.request, done.sample, done.finish) == (number, 0, "length")
    for name in ("tokens_T", "logp_T", "softmax_logp_T"):
        np.testing.assert_array_equal(np.concatenate([getattr(each, name) for each in pieces]), getattr(done, name))


def test_weights_are_sent_every_interval_th_version(fakes):
    send = Names()
    with engine(fakes(1), send, interval=3, version=7) as found:
        for version in range(8, 15):
            found.sync(f"of {version}", version)
        assert found.version == 13
        found.sync("of 15", 15, now=True)
        assert found.version == 15
    assert [version for _, version, _, _ in send.sent] == [7, 10, 13, 15]


def test_cancelled_requests_come_out_at_once_and_end_on_the_server(fakes):
    servers = fakes(1, seconds_a_token=0.05)
    with engine(servers) as found:
        number = found.submit(requests(1, samples=3, limit=100, stop_token_ids=())[0])
        other = found.submit(requests(2, samples=1, limit=5, stop_token_ids=())[1])
        until(lambda: servers[0].draws == 4)
        found.cancel(number)
        began = time.monotonic()
        events = found.step()
        assert time.monotonic() - began < 3  # five for all its tokens
        ended = [each for each in events if isinstance(each, Completion)]
        assert [(each.request, each.sample, each.finish) for each in ended] == [
            (number, n, "cancelled") for n in range(3)
        ]
        assert all(len(each.tokens_T) == len(each.versions_T) == 0 for each in ended)
        (last,) = drain(found)
        assert (last.request, last.finish) == (other, "length")
        assert not found.busy
        assert found.step() == []


def test_what_came_before_it_was_cancelled_does_not_come_out_after(fakes):
    with engine(fakes(1)) as found:
        number = found.submit(requests(1, samples=1)[0])
        until(lambda: not found._answers.empty())
        found.cancel(number)
        other = found.submit(requests(1, samples=1)[0])
        assert [(each.request, each.finish == "cancelled") for each in drain(found)] == [(number, True), (other, False)]


def test_closing_what_generates_ends_it(fakes):
    servers = fakes(1, seconds_a_token=0.02)
    with engine(servers) as found:
        asked = requests(6, samples=2)
        drawing = found.generate(asked)
        next(drawing)
        drawing.close()
        assert not found.busy
        check_right(list(found.generate(asked)), asked, versions={0})


def test_a_second_use_at_a_time_is_refused(fakes):
    with engine(fakes(1)) as found:
        found.submit(requests(1)[0])
        with pytest.raises(RuntimeError, match="busy"):
            next(found.generate(requests(1)))


def test_weights_change_from_another_thread_while_this_one_draws(fakes):
    with engine(fakes(2, seconds_a_token=0.01), in_turn=False) as found:
        stop = threading.Event()

        def train() -> None:
            version = 0
            while not stop.is_set():
                version += 1
                found.sync(f"of {version}", version)
                found.mend()
                time.sleep(0.01)

        trainer = threading.Thread(target=train)
        trainer.start()
        asked = requests(3, samples=4, limit=50, stop_token_ids=())
        done = list(found.generate(asked))
        stop.set()
        trainer.join()
    check_right(done, asked, versions=range(1000))
    assert len({version for each in done for version in each.versions_T.tolist()}) > 3


def test_processes_go_through_the_same_steps_and_the_first_alone_speaks_to_servers(fakes, monkeypatch):
    servers, together, asked = fakes(2), Together(3), requests(4)
    monkeypatch.setattr(processes, "by_first", together.by_first)
    sends = [Names(), Names(), Names()]

    def run(number: int) -> list[list[object]]:
        with engine(servers if number == 0 else [], sends[number], wait=1.0) as found:
            done = [_told(found.generate(asked))]
            found.sync("newer", 1)
            servers[0].misbehave("gives NaN")  # by each of them, so that one of the steps mends what is lost
            done.append(_told(found.generate(asked)))
            numbers = [found.submit(each) for each in asked]
            found.cancel(numbers[1])
            done.append(_told(drain(found)))
            for each in servers:
                each.end()
            with pytest.raises(RunError, match="vllm_wait"):
                list(found.generate(asked))
            return [*done, found.length]

    first, second, third = together.run(run)
    assert first == second == third
    assert len(first[0]) == len(first[1]) == len(first[2]) == 8
    assert [each[:2] for each in sends[0].sent] == [each[:2] for each in sends[1].sent]
    assert sends[0].whole == sends[1].whole == sends[2].whole
    assert sends[0].whole[:2] == [True, False]
    assert not any(stale or fresh for _, _, stale, fresh in sends[1].sent)


def _told(done) -> list[object]:
    return [(each.request, each.sample, each.finish, each.tokens_T.tolist()) for each in done]


def test_episodes_are_played_over_servers(fakes):
    words, prompt = tiny.tokenizer(), Prompt("row 1", (), "a")
    tasks = [Task(prompt, [5, 6, number], seed=number) for number in range(5)]
    with engine(fakes(2), tokenizer=words) as found:
        sampling = Sampling(max_new_tokens=6, stop_token_ids=STOPS)
        played = dict(episodes.play(found, tasks, 3, sampling, words, ahead=2))
    assert sorted(played) == list(range(5))
    for index, group in played.items():
        asked = Request(tasks[index].ids, 3, Sampling(max_new_tokens=6, stop_token_ids=STOPS, seed=index))
        done = [
            Completion(0, n, each.tokens_T, each.logp_T, each.logp_T, each.versions_T, each.finish, each.stopped_by)
            for n, each in enumerate(group)
        ]
        check_right(done, [asked], versions={0})


def test_servers_that_take_too_few_tokens_are_refused(fakes):
    with pytest.raises(UserError, match=f"--max-model-len {LONGEST + 1}"):
        engine(fakes(2), length=LONGEST + 1)


def test_the_key_of_servers_is_told_them(fakes):
    from luthier.rollout.vllm.fleet import Elsewhere

    servers = fakes(1, key="secret")
    with engine(servers, servers=Elsewhere([servers[0].url], "secret")) as found:
        assert len(list(found.generate(requests(1)))) == 2
    with pytest.raises(RunError, match="401"):
        engine(servers, wait=0.2)

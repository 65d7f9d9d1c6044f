"""The vLLM engine over servers that fail: no wrong completion comes out, and the run goes on or says why not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from fake_faults import FAULTS
from fleets import Names, Owned, check_right, drain, engine, requests, until

import tiny
from luthier.errors import RunError
from luthier.rollout import episodes
from luthier.rollout.engine import Request, Sampling
from luthier.rollout.episodes import Task
from luthier.rollout.prompts import Prompt
from luthier.rollout.vllm.engine import VllmEngine

RESUMES = "give the same command again"
SLOW = ("hangs", "is late")


@pytest.mark.parametrize("fault", FAULTS)
def test_of_two_servers_one_misbehaves(fakes, fault):
    servers, said = fakes(2), []
    asked = _asked(4, fault)
    with engine(servers, timeout=2.0 if fault in SLOW else 5.0, say=said.append) as found:
        servers[0].misbehave(fault, times=2)
        check_right(list(found.generate(asked)), asked, versions={0})
        assert any(servers[0].url in each for each in said), said
        assert not any(servers[1].url in each for each in said), said
        if fault == "dies":
            return
        until(lambda: found.mend() or servers[0].versions[1:])  # trusted again, with weights given anew
        before = len(servers[0].asked)
        check_right(list(found.generate(asked)), asked, versions={0})
        assert len(servers[0].asked) > before


@pytest.mark.parametrize("fault", ["dies", "hangs", "draws too few tokens", "has an older version", "gives NaN"])
def test_a_lone_server_is_waited_for_and_goes_on_with_the_weights_of_now(fakes, fault):
    servers, send = fakes(1), Names()
    owned = Owned(servers)
    asked = _asked(2, fault)
    with engine(servers, send, servers=owned, timeout=2.0 if fault in SLOW else 5.0) as found:
        found.sync("newer", 1)
        servers[0].misbehave(fault)
        check_right(list(found.generate(asked)), asked, versions={1})
    assert send.sent == [("params", 0, 0, 1), ("newer", 1, 1, 0), ("newer", 1, 0, 1)]
    assert bool(owned.restarts) == (fault in ("dies", "hangs"))  # one that answers nonsense once gets its weights anew


def test_a_server_that_was_started_anew_behind_our_back_is_not_believed(fakes):
    servers = fakes(1)
    with engine(servers) as found:
        servers[0].end()
        servers[0].begin()
        asked = requests(3)
        check_right(list(found.generate(asked)), asked, versions={0})
    assert servers[0].versions == ["0", "0"]


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_where_nobody_starts_it_again_the_run_ends_in_time_and_says_why(fakes, fault):
    servers = fakes(1)
    with engine(servers, timeout=1.0, wait=0.5) as found:
        servers[0].misbehave(fault, times=10**6)
        if fault == "hangs":  # it listens, and goes no further
            servers[0].mute = True
        began = time.monotonic()
        with pytest.raises(RunError) as raised:
            list(found.generate(requests(2)))
        assert time.monotonic() - began < 15
    told = str(raised.value)
    assert servers[0].url in told
    assert ("unreachable" if fault == "dies" else "vllm_timeout") in told
    assert "none came back within 0.5 s (vllm_wait)" in told
    assert RESUMES in told


def test_a_server_that_is_started_too_often_is_the_end_with_its_last_words(fakes):
    servers = fakes(1)
    owned = Owned(servers, most=1, after=0.0)
    with engine(servers, servers=owned) as found:
        servers[0].misbehave("dies", times=10**6)
        with pytest.raises(RunError, match="no server is left") as raised:
            list(found.generate(requests(2)))
    assert "CUDA out of memory" in str(raised.value)
    assert RESUMES in str(raised.value)
    assert len(owned.restarts) == 1


def test_a_server_that_answers_nonsense_again_and_again_is_not_asked_any_more(fakes):
    servers, said = fakes(2), []
    asked = requests(4)
    with engine(servers, say=said.append) as found:
        servers[0].misbehave("gives NaN", times=10**6)
        until(lambda: _right(found, asked) and any("failed 3 times in a row" in each for each in said))
        before = len(servers[0].asked)
        assert _right(found, asked)
    assert len(servers[0].asked) == before


@pytest.mark.parametrize("fault", ["draws too many tokens", "answers 500"])
def test_where_every_answer_is_wrong_the_run_ends(fakes, fault):
    servers = fakes(2)
    with engine(servers) as found:
        for each in servers:
            each.misbehave(fault, times=10**6)
        with pytest.raises(RunError, match=RESUMES):
            list(found.generate(requests(2)))


def test_a_completion_that_servers_fail_by_is_the_end(fakes, monkeypatch):
    monkeypatch.setattr("luthier.rollout.vllm.fleet.MOST_STRIKES", 10**6)
    servers = fakes(2)
    with engine(servers) as found:
        for each in servers:
            each.misbehave("answers 500", times=10**6)
        with pytest.raises(RunError, match="one completion failed 5 times"):
            list(found.generate(requests(1, samples=1)))
    assert sum(len(each.asked) for each in servers) == 5


def test_after_the_end_episodes_are_taken_back_without_another_word(fakes):
    servers, words = fakes(1), tiny.tokenizer()
    tasks = [Task(Prompt("row 1", (), "a"), [5, number], seed=number) for number in range(3)]
    with engine(servers, wait=0.2, tokenizer=words) as found:
        servers[0].end()
        with pytest.raises(RunError, match=RESUMES):
            list(episodes.play(found, tasks, 2, Sampling(max_new_tokens=4), words))
        assert not found.busy
        with pytest.raises(RunError, match=RESUMES):  # and it stays so
            found.sync("newer", 1)


def test_a_server_that_comes_back_draws_nothing_before_it_is_mended(fakes):
    servers, send = fakes(1), Names()
    owned = Owned(servers)
    with engine(servers, send, servers=owned, in_turn=False) as found:
        servers[0].misbehave("dies")
        asked = requests(1)
        number = found.submit(asked[0])
        until(lambda: owned.restarts and servers[0].alive)
        before = len(servers[0].asked)
        for _ in range(5):
            assert found.step() == []
        assert len(servers[0].asked) == before
        assert len(send.sent) == 1
        found.mend()
        check_right(drain(found), asked, versions={0}, numbers=[number])
    assert len(send.sent) == 2


@pytest.mark.parametrize("path", ["/pause", "/reset_prefix_cache", "/update_weight_version", "/resume"])
def test_a_server_that_does_not_take_weights_is_not_asked(fakes, path):
    servers, send = fakes(2), Names()
    asked = requests(3)
    with engine(servers, send, in_turn=False) as found:
        servers[0].refuses = path
        found.sync("newer", 1)
        check_right(list(found.generate(asked)), asked, versions={1})
        assert not servers[0].asked
        servers[0].refuses = ""
        until(lambda: found.mend() or send.sent[-1] == ("newer", 1, 0, 1))
        check_right(list(found.generate(asked)), asked, versions={1})
        assert servers[0].asked


def test_a_server_that_takes_no_weights_at_the_start_ends_the_run(fakes):
    servers = fakes(2)
    servers[1].refuses = "/update_weight_version"
    with pytest.raises(RunError, match="did not take the weights") as raised:
        engine(servers)
    assert servers[1].url in str(raised.value)
    assert servers[0].url not in str(raised.value)


def test_a_server_that_dies_while_it_takes_weights_leaves_its_completions_to_others(fakes):
    servers = fakes(2, seconds_a_token=0.02)
    asked = requests(4, limit=30, stop_token_ids=())
    with engine(servers) as found:
        numbers = [found.submit(each) for each in asked]
        until(lambda: sum(each.draws for each in servers) == 8)
        servers[0].refuses = "/update_weight_version"
        found.sync("newer", 1)
        check_right(drain(found), asked, versions={0, 1}, numbers=numbers)


def test_tokens_of_older_weights_after_those_of_newer_ones_are_not_believed(fakes):
    servers, said = fakes(2, seconds_a_token=0.01), []
    asked = requests(2, samples=2, limit=40, stop_token_ids=())
    with engine(servers, say=said.append) as found:
        servers[0].misbehave("turns its versions round", times=1)
        numbers = [found.submit(each) for each in asked]
        until(lambda: all(each.draws == 2 for each in servers))
        time.sleep(0.05)
        found.sync("newer", 1)
        check_right(drain(found), asked, versions={0, 1}, numbers=numbers)
    assert any("older weights after" in each for each in said)


def test_the_time_that_weights_take_is_nobodys_fault(fakes):
    servers, said = fakes(1, seconds_a_token=0.01), []

    class Slow(Names):
        async def _name(self, client, version):
            await client.pause("keep")
            await asyncio.sleep(4.0 * bool(version))
            await client.set_version(version)
            await client.resume()

    asked = requests(2, limit=20, stop_token_ids=())
    with engine(servers, Slow(), timeout=3.0, say=said.append) as found:
        numbers = [found.submit(each) for each in asked]
        until(lambda: servers[0].draws == 4)
        found.sync("newer", 1)
        check_right(drain(found), asked, versions={0, 1}, numbers=numbers)
    assert not said


def test_a_server_that_comes_back_with_less_room_is_not_asked(fakes):
    servers, said = fakes(2), []
    asked = requests(3)
    with engine(servers, length=40, say=said.append) as found:
        servers[0].end()
        servers[0].longest = 39
        servers[0].begin()
        check_right(list(found.generate(asked)), asked, versions={0})
        until(lambda: any("--max-model-len 40" in each for each in said))
        before = len(servers[0].asked)
        check_right(list(found.generate(asked)), asked, versions={0})
    assert len(servers[0].asked) == before


def test_servers_that_are_not_there_at_the_start_are_named(fakes):
    servers = fakes(2)
    servers[1].end()
    with pytest.raises(RunError, match=r"did not come within 0.3 s \(vllm_wait\)") as raised:
        engine(servers, wait=0.3)
    assert servers[1].url in str(raised.value)


@pytest.mark.parametrize("fault", ["dies", "gives NaN"])
def test_what_starting_it_again_raises_is_raised_here(fakes, fault):
    class Broken(Owned):
        def restart(self, url: str) -> bool:
            raise OSError("too many open files")

    servers = fakes(1)
    with engine(servers, servers=Broken(servers)) as found:
        servers[0].misbehave(fault, times=10**6)
        with pytest.raises(OSError, match="too many open files"):
            list(found.generate(requests(2)))


def test_what_looking_at_it_again_raises_is_raised_here(fakes, monkeypatch):
    servers = fakes(1)
    with engine(servers) as found:
        monkeypatch.setattr(found._fleet.members[0].client, "facts", None)
        servers[0].misbehave("gives NaN")
        with pytest.raises(TypeError, match="not callable"):
            list(found.generate(requests(2)))


def test_a_server_that_ends_at_its_start_is_not_waited_for(fakes):
    servers = fakes(2)
    for each in servers:
        each.end()
    began = time.monotonic()
    with pytest.raises(RunError, match=f"{servers[1].url} ended before it was ready. CUDA out of memory"):
        engine(servers, servers=Owned(servers, starting=(servers[0].url,)), wait=60.0)
    assert time.monotonic() - began < 10


def _asked(count: int, fault: str) -> list[Request]:
    """Return requests whose completions differ by the fault: where one may stop early, its length proves nothing."""
    return requests(count, limit=8, **({} if "stop" in fault else {"stop_token_ids": ()}))


def _right(found: VllmEngine, asked: Sequence[Request]) -> bool:
    check_right(list(found.generate(asked)), asked, versions={0})
    return True

"""Sampling ahead: how far behind its weights may be, who answers questions meanwhile, and how it ends."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from luthier import config, mesh
from luthier.train import feed_apart
from luthier.train.feed import Ahead, InTurn
from luthier.train.feed_apart import ApartAhead

SECONDS = 10  # generous: nothing here takes a tenth of one


class Sampler:
    """A sampler that notes which version of the weights each step began and ended with."""

    def __init__(self, chunks: int = 1) -> None:
        self.mesh = mesh.make(config.RlConfig(load_parameters_path="tiny"), jax.devices()[:1])
        self.engine = SimpleNamespace(sync=self._sync)
        self.version, self.chunks = 0, chunks
        self.seen: dict[int, tuple[int, int]] = {}
        self.failing_at: int | None = None

    def collect(self, number: int, position: int, between: Any = None) -> Any:
        began = self.version
        if number == self.failing_at:
            raise ValueError(f"step {number} went wrong")
        for _ in range(self.chunks):
            time.sleep(0.001)
            if between is not None:
                between()
        self.seen[number] = began, self.version
        return SimpleNamespace(number=number, position=position + 1)

    def _sync(self, params: Any, version: int) -> None:
        self.version = version


def ahead(sampler: Any, staleness: int, last: int = 6) -> Ahead:
    return Ahead(sampler, lambda trained: trained, number=1, last=last, position=0, staleness=staleness)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("staleness", [1, 2])
def test_weights_are_never_older_than_the_bound_and_the_sampler_does_run_ahead(staleness: int) -> None:
    sampler = Sampler()
    feed = ahead(sampler, staleness)
    try:
        for number in range(1, 7):
            assert feed.next().number == number
            deadline = time.monotonic() + SECONDS
            while number + staleness <= 6 and number + staleness not in sampler.seen and time.monotonic() < deadline:
                time.sleep(0.001)  # with the weights that are there it goes on to this step, and no further
            time.sleep(0.01)
            assert max(sampler.seen) == min(number + staleness, 6)
            feed.publish({}, number)
    finally:
        feed.close()
    behind = [number - 1 - began for number, (began, _) in sampler.seen.items()]
    assert max(behind) == staleness
    assert min(behind) >= 0


@pytest.mark.timeout(60)
def test_new_weights_are_taken_up_in_the_middle_of_a_step() -> None:
    sampler = Sampler(chunks=200)
    feed = ahead(sampler, staleness=1)
    try:
        assert feed.next().number == 1  # and step 2 is being sampled
        feed.publish({}, 1)
        assert feed.next().number == 2
    finally:
        feed.close()
    assert sampler.seen[2] == (0, 1)


@pytest.mark.timeout(60)
def test_a_question_is_answered_by_the_weights_published_last() -> None:
    sampler = Sampler()
    feed = ahead(sampler, staleness=1)
    try:
        feed.next()
        feed.publish({}, 1)
        assert feed.ask(lambda asked, between: asked.version) == 1
        with pytest.raises(ZeroDivisionError):
            feed.ask(lambda asked, between: 1 / 0)
        assert feed.next().number == 2  # an answer that failed does not end the sampling
    finally:
        feed.close()


@pytest.mark.timeout(60)
def test_what_goes_wrong_in_the_thread_is_raised_to_whoever_waits() -> None:
    sampler = Sampler()
    sampler.failing_at = 2
    feed = ahead(sampler, staleness=1)
    assert feed.next().number == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="step 2 went wrong"):
            feed.next()
    with pytest.raises(ValueError, match="step 2 went wrong"):
        feed.ask(lambda asked, between: None)
    feed.close()


class Servers:
    """An engine in other processes, which has lost its weights until it is mended, where it is ``broken``."""

    def __init__(self, broken: bool = False, interval: int = 1) -> None:
        self.version, self.interval = 0, interval
        self.there = threading.Event()
        if not broken:
            self.there.set()

    def sync(self, params: Any, version: int = 0, *, now: bool = False) -> None:
        if now or version - self.version >= self.interval:
            self.version = version

    def mend(self) -> None:
        self.there.set()


def apart(sampler: Sampler, engine: Servers, staleness: int = 1) -> ApartAhead:
    def between_chunks() -> None:
        assert engine.there.wait(SECONDS)
        sampler.version = engine.version

    original = sampler.collect

    def collect(number: int, position: int, between: Any = None) -> Any:
        between_chunks()
        return original(number, position, between)

    sampler.collect = collect  # type: ignore[method-assign]
    return ApartAhead(sampler, engine, number=1, last=6, position=0, staleness=staleness)  # type: ignore[arg-type]


@pytest.mark.timeout(60)
def test_servers_that_came_back_are_given_weights_while_the_trainer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_apart, "MEND_SECONDS", 0.01)
    feed = apart(Sampler(), Servers(broken=True))
    try:
        assert feed.next().number == 1
    finally:
        feed.close()


@pytest.mark.timeout(60)
def test_sampling_ahead_of_servers_waits_for_what_they_were_sent() -> None:
    sampler, engine = Sampler(), Servers(interval=2)
    feed = apart(sampler, engine)
    try:
        for number in range(1, 7):
            assert feed.next().number == number
            feed.publish({}, number, now=number == 5)
            assert engine.version == {5: 5, 6: 5}.get(number, number // 2 * 2)
            if number == 5:
                assert feed.ask(lambda asked, between: asked.engine is not None)
    finally:
        feed.close()
    assert all(number - 1 - began <= 1 for number, (began, _) in sampler.seen.items())


@pytest.mark.timeout(60)
def test_what_goes_wrong_ahead_of_servers_is_raised() -> None:
    sampler = Sampler()
    sampler.failing_at = 2
    feed = apart(sampler, Servers())
    assert feed.next().number == 1
    with pytest.raises(ValueError, match="step 2 went wrong"):
        feed.next()
    with pytest.raises(ValueError, match="step 2 went wrong"):
        feed.ask(lambda asked, between: None)
    feed.close()


@pytest.mark.timeout(60)
def test_weights_that_cannot_be_taken_up_are_told_to_whoever_asks() -> None:
    sampler = Sampler()
    feed = ahead(sampler, staleness=1, last=1)
    feed.next()
    sampler.engine.sync = lambda params, version: 1 / 0
    feed.publish({}, 1)
    with pytest.raises(ZeroDivisionError):
        feed.ask(lambda asked, between: None)
    feed.close()


@pytest.mark.timeout(60)
def test_closing_breaks_off_a_step_and_a_question() -> None:
    feed = ahead(Sampler(chunks=1_000_000), staleness=1)
    started = time.monotonic()
    feed.close()
    asked, told = threading.Event(), []

    def endless(sampler: Any, between: Any) -> None:
        asked.set()
        while True:
            between()
            time.sleep(0.001)

    feed = ahead(Sampler(), staleness=1)

    def ask() -> None:
        try:
            feed.ask(endless)
        except Exception as error:
            told.append(error)

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    assert asked.wait(SECONDS)
    feed.close()
    waiting.join(SECONDS)
    assert len(told) == 1
    assert time.monotonic() - started < SECONDS
    assert not [thread for thread in threading.enumerate() if thread.name == "sampler"]


def test_in_turn_each_step_is_sampled_when_asked_for() -> None:
    sampler: Any = Sampler()
    feed = InTurn(sampler, lambda trained: trained, number=3, position=7)
    assert (feed.next().number, feed.next().position) == (3, 9)
    feed.publish({}, 4)
    assert feed.ask(lambda asked, between: asked.version) == 4
    assert sampler.seen == {3: (0, 0), 4: (0, 0)}

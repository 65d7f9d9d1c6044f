"""An engine over fake servers, what it is asked, and whether what it says is right."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake import VOCAB, Fake, token

from luthier.errors import RunError, UserError
from luthier.rollout.engine import Completion, Request, Sampling
from luthier.rollout.vllm import engine as engine_lib
from luthier.rollout.vllm import fleet
from luthier.rollout.vllm.client import Client, Failure, Pause
from luthier.rollout.vllm.engine import VllmEngine
from luthier.rollout.vllm.fleet import Elsewhere
from luthier.rollout.vllm.sending import Sent
from luthier.rollout.vllm.weights import Call

LIMIT = 12
STOPS = (0, 1, 2)


@dataclass
class Names:
    """A ``Send`` of nothing but the version; ``sent`` are (params, version, number of stale servers, of fresh ones)."""

    pause_mode: Pause = "keep"
    adapter: str = ""
    sent: list[tuple[Any, int, int, int]] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)

    def __call__(
        self, params: Any, version: int, stale: Sequence[Client], fresh: Sequence[Client], *, whole: bool, call: Call
    ) -> Sent:
        """Pause, name the version, and go on."""
        self.sent.append((params, version, len(stale), len(fresh)))
        self.whole.append(whole)
        failed: dict[Client, Failure] = {}
        for client in (*stale, *fresh):
            try:
                call(self._name(client, version))
            except Failure as failure:
                failed[client] = failure
        return Sent(failed, 0.0, 0)

    async def _name(self, client: Client, version: int) -> None:
        await client.pause(self.pause_mode)
        await client.reset_prefix_cache()
        await client.set_version(version)
        await client.resume()


@contextlib.contextmanager
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    """Run two servers, which engines look at often."""
    monkeypatch.setattr(fleet, "LOOK_SECONDS", 0.03)
    monkeypatch.setattr(engine_lib, "STEP_SECONDS", 0.05)
    both = [Fake(), Fake()]
    yield both
    for each in both:
        each.end()


def engine(
    fakes: Sequence[Fake], send: Any = None, params: Any = "params", *, servers: Any = None, **settings: Any
) -> VllmEngine:
    """Return an engine over these servers, which waits for seconds only."""
    servers = servers or (Elsewhere([each.url for each in fakes]) if fakes else None)
    usual: dict[str, Any] = {"vocab_size": VOCAB, "timeout": 5.0, "wait": 5.0, "seed": 5}
    return VllmEngine(servers, send or Names(), params, **usual | settings)


def requests(count: int, samples: int = 2, limit: int = LIMIT, **sampling: Any) -> list[Request]:
    """Return requests with a seed each."""
    how = {"stop_token_ids": STOPS, "max_new_tokens": limit}
    return [Request([7, 8, number], samples, Sampling(seed=100 + number, **how | sampling)) for number in range(count)]


def check_right(
    done: Sequence[Completion], asked: Sequence[Request], versions: Collection[int], numbers: Sequence[int] = ()
) -> None:
    """Check that each completion asked for is there once, and is to the bit what an honest server draws.

    ``numbers`` are those of the requests, where they were submitted.
    """
    numbers = numbers or range(len(asked))
    wanted = {(number, sample) for number, each in zip(numbers, asked, strict=True) for sample in range(each.samples)}
    assert sorted((each.request, each.sample) for each in done) == sorted(wanted)
    for each in done:
        request = asked[list(numbers).index(each.request)]
        _check(each, request, seed_of(request.sampling.seed, each.sample))
        assert set(each.versions_T.tolist()) <= set(versions)


def drain(of: VllmEngine) -> list[Completion]:
    """Return the completions that are under way, once they are done."""
    done: list[Completion] = []
    while of.busy:
        done += [each for each in of.step() if isinstance(each, Completion)]
    return done


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def seed_of(seed: int | None, sample: int) -> int:
    """Return the seed of a sample of a request with a seed of its own."""
    words = np.random.SeedSequence([sample, 1, 0, seed or 0, 0]).generate_state(2)
    return (int(words[0]) << 32 | int(words[1])) >> 1


def _check(done: Completion, request: Request, seed: int) -> None:
    versions = done.versions_T.tolist()
    honest = [token(request.prompt, seed, place, str(version)) for place, version in enumerate(versions)]
    assert done.tokens_T.tolist() == [each for each, _ in honest]
    assert (done.tokens_T.dtype, done.logp_T.dtype, done.versions_T.dtype) == (np.int32, np.float32, np.int32)
    np.testing.assert_array_equal(done.logp_T, np.array([logp for _, logp in honest], np.float32))
    np.testing.assert_array_equal(done.softmax_logp_T, done.logp_T)
    stops = [each in request.sampling.stop_token_ids for each, _ in honest]
    assert not any(stops[:-1])
    if stops[-1]:
        assert (done.finish, done.stopped_by) == ("stop", honest[-1][0])
    else:
        assert (done.finish, done.stopped_by) == ("length", None)
        assert len(honest) == request.sampling.max_new_tokens


@dataclass
class Owned:
    """Servers that are started again, ``after`` some seconds and at most ``most`` times each."""

    fakes: Sequence[Fake]
    most: int = 3
    after: float = 0.1
    api_key: str = ""
    restarts: list[str] = field(default_factory=list)
    starting: tuple[str, ...] = ()

    @property
    def urls(self) -> list[str]:
        """Where they are."""
        return [each.url for each in self.fakes]

    def running(self, url: str) -> bool:
        """Whether it is starting, or there."""
        return self._of(url).alive or bool(self.restarts) or url in self.starting

    def restart(self, url: str) -> bool:
        """End it and start it."""
        if self.restarts.count(url) == self.most:
            return False
        self.restarts.append(url)
        threading.Thread(target=self._start, args=(self._of(url),), daemon=True).start()
        return True

    def failure(self, url: str) -> str:
        """Return its log."""
        return "CUDA out of memory"

    def close(self) -> None:
        """Leave them to the fixture."""

    def _of(self, url: str) -> Fake:
        return next(each for each in self.fakes if each.url == url)

    def _start(self, fake: Fake) -> None:
        fake.end()
        time.sleep(self.after)
        fake.begin()


class Together:
    """Threads as the processes of a run: what the first one's functions give is told to all."""

    def __init__(self, count: int) -> None:
        """Know that there are ``count``."""
        self._here, self._barrier = threading.local(), threading.Barrier(count, timeout=20)
        self._count, self._told = count, b""

    def by_first(self, function: Callable[[], Any]) -> Any:
        """Do as ``processes.by_first``; where it is not one of these threads, as a lone process."""
        number = getattr(self._here, "number", None)
        if number is None:
            return function()
        if number == 0:
            try:
                self._told = pickle.dumps((function(), None))
            except (UserError, RunError) as error:
                self._told = pickle.dumps((None, error))
        self._barrier.wait()
        value, error = pickle.loads(self._told)
        self._barrier.wait()  # before the next one is told
        if error is not None:
            raise error
        return value

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return what the function gives, or raises, in each of them, called with its number."""

        def numbered(number: int) -> Any:
            self._here.number = number
            try:
                return function(number)
            except RunError as error:
                return error

        with ThreadPoolExecutor(self._count) as threads:
            return list(threads.map(numbered, range(self._count)))

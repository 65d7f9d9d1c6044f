"""The vLLM servers of a run: who is there and with which weights, and what follows a failure.

A server is *away* until it answers, then *fresh* until it was given weights, *taking* them, and *ready* to draw. One
that fails is away again, whatever it failed by, and trusted again only with weights that it was given anew. After too
many failures in a row, or where nobody starts it again, it is *gone*.

Left out on purpose: threads, since all of this lives on one event loop; what is in the weights (``sending``); and what
is drawn where (``asking``).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from luthier.errors import RunError, UserError
from luthier.rollout.vllm.client import Client, Facts, Failure

MOST_STRIKES = 3
"""Failures in a row, without a good completion between them, after which a server is gone."""
LOOK_SECONDS, LOOK_TIMEOUT = 1.0, 10.0
"""Between two looks at a server that is away, and for one of them."""
SAY_SECONDS = 30.0
MOST_NOTES = 20
REMEDY = "See to the servers, then give the same command again: a training run goes on from its last checkpoint."

State = Literal["away", "fresh", "taking", "ready", "gone"]


class Servers(Protocol):
    """The servers of a run: processes of its own (``servers``), or ones that run elsewhere (``Elsewhere``).

    All methods return at once, and may be called from any thread.
    """

    @property
    def urls(self) -> Sequence[str]:
        """Where they are; the same ones all the time."""
        ...

    @property
    def api_key(self) -> str:
        """What they want to be told, "" for nothing."""
        ...

    def running(self, url: str) -> bool:
        """Whether the server may answer some time: false where its process is known to have ended."""
        ...

    def restart(self, url: str) -> bool:
        """Begin to start a server anew that has failed, ending what there is of it; say whether it may come back."""
        ...

    def failure(self, url: str) -> str:
        """Return what a server said last, such as the end of its log, "" where that is not known."""
        ...

    def close(self) -> None:
        """End the servers that are the run's own."""
        ...


@dataclass(frozen=True)
class Elsewhere:
    """Servers that someone else starts, and starts again."""

    urls: Sequence[str]
    api_key: str = ""

    def running(self, url: str) -> bool:
        """Hope so."""
        return True

    def restart(self, url: str) -> bool:
        """Leave it to whoever started it."""
        return True

    def failure(self, url: str) -> str:
        """Know nothing."""
        return ""

    def close(self) -> None:
        """Leave them as they are."""


@dataclass(eq=False)
class Server:
    """What is known of one server.

    ``versions`` are those that it was given since it was fresh, the one that it is taking included. ``reading`` counts
    its completions by request. ``heard`` is when it last did something; ``lost`` is set once it fails.
    """

    client: Client
    lost: asyncio.Event
    state: State = "away"
    versions: list[int] = field(default_factory=list)
    reading: Counter[int] = field(default_factory=Counter)
    drawing: int = 0
    strikes: int = 0
    heard: float = 0.0

    def hold(self, request: int, count: int) -> None:
        """Take ``count`` more completions of a request, or fewer."""
        self.drawing += count
        self.reading[request] += count
        if not self.reading[request]:
            del self.reading[request]


class Fleet:
    """The servers as one. To be made and used on one event loop."""

    def __init__(
        self,
        servers: Servers,
        make: Callable[[str], Client],
        *,
        length: int | None = None,
        wait: float,
        say: Callable[[str], None],
    ) -> None:
        """Know nothing of them yet. ``length`` is what they must take, None for anything; ``say`` hears of changes."""
        self._servers, self._length, self._wait, self._say = servers, length, wait, say
        self.members = [Server(make(url), asyncio.Event()) for url in servers.urls]
        self.ended: BaseException | None = None
        self._listeners: list[Callable[[], None]] = []
        self._history: deque[str] = deque(maxlen=MOST_NOTES)
        self._nobody_since: float | None = None
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> int:
        """Wait for all servers and return the most tokens that each of them takes.

        Raises RunError where one does not come in time, and UserError where one takes too few tokens.
        """
        deadline = time.monotonic() + self._wait
        facts = [await self._first_look(server, deadline) for server in self.members]
        self._watching = asyncio.create_task(self._watch())
        self._watching.add_done_callback(self._watched)
        return min(each.max_model_len for each in facts)

    async def close(self) -> None:
        """Let go of the servers."""
        if self._watching is not None:
            self._watching.cancel()
        for server in self.members:
            await server.client.close()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever a server is ready, or there is what ``ended`` it all."""
        self._listeners.append(listener)

    @property
    def fresh(self) -> bool:
        """Whether a server waits for weights. May be asked in any thread."""
        return any(server.state == "fresh" for server in self.members)

    async def take(self, version: int) -> tuple[list[Client], list[Client]]:
        """Return the servers with older weights and those without any, which from now on are taking ``version``.

        Where none is there it waits for one. Raises RunError where that takes too long.
        """
        while self.ended is None and not any(server.state in ("ready", "fresh") for server in self.members):
            await asyncio.sleep(LOOK_SECONDS / 10)
        if self.ended is not None:
            raise self.ended
        stale = [each for each in self.members if each.state == "ready" and each.versions[-1] != version]
        fresh = [each for each in self.members if each.state == "fresh"]
        for server in (*stale, *fresh):
            server.state = "taking"
            server.versions.append(version)
        return [server.client for server in stale], [server.client for server in fresh]

    async def taken(self, failed: Mapping[Client, Failure]) -> bool:
        """Let servers draw that took what they were to, and lose those that failed; say whether any is ready."""
        for server in self.members:
            if server.state == "taking" and server.client in failed:
                self.lose(server, failed[server.client])
            elif server.state == "taking":
                server.state, server.heard = "ready", time.monotonic()
        self._tell()
        return any(server.state == "ready" for server in self.members)

    def lose(self, server: Server, failure: Failure) -> None:
        """Take a server out of use until it is there again and was given weights; once is enough."""
        if server.lost.is_set():
            return
        server.lost.set()
        server.state, server.strikes = "away", server.strikes + 1
        url = server.client.url
        what = f"{failure.what.rstrip('.')} ({failure.kind}). Its {server.drawing} completions are asked of others."
        self._note(server, f"{what}{self._last_words(url)}")
        ended = failure.kind in ("unreachable", "late") or server.strikes > 1
        if server.strikes >= MOST_STRIKES:
            self._give_up(server, f"failed {MOST_STRIKES} times in a row")
        elif ended and not self._servers.restart(url):
            self._give_up(server, "is not started again")

    def end(self, why: str) -> None:
        """Draw no more: whoever waits for a server is told why, and what happened before."""
        if self.ended is None:
            what = "".join(f"\n  {note}" for note in self._history)
            self.ended = RunError(f"sampling from vLLM ended: {why}.{what}\n{REMEDY}")
            self._tell()

    async def _first_look(self, server: Server, deadline: float) -> Facts:
        url, said = server.client.url, time.monotonic()
        while isinstance(facts := await self._look(server), Failure):
            why = facts.what.rstrip(".")
            if dead := next((each for each in self._servers.urls if not self._servers.running(each)), None):
                raise RunError(f"the vLLM server {dead} ended before it was ready.{self._last_words(dead)}")
            if time.monotonic() > deadline:
                within = f"did not come within {self._wait:g} s (vllm_wait)"
                raise RunError(f"the vLLM server {url} {within}: {why}.{self._last_words(url)}")
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                self._say(f"waiting for the vLLM server {url}: {why}")
            await asyncio.sleep(LOOK_SECONDS)
        if short := self._short(facts):
            raise UserError(f"the vLLM server {url} {short}.")
        return facts

    async def _look(self, server: Server) -> Facts | Failure:
        """Return what a server that was away says of itself, and make it fresh; or why it is still away."""
        try:
            facts = await asyncio.wait_for(server.client.facts(), LOOK_TIMEOUT)
        except TimeoutError:
            return Failure(server.client.url, f"no answer within {LOOK_TIMEOUT:g} s", "late")
        except Failure as failure:
            return failure
        server.state, server.lost, server.versions = "fresh", asyncio.Event(), []
        return facts

    def _short(self, facts: Facts) -> str:
        """Say what is wrong with a server that takes too few tokens, "" of one that takes enough."""
        if self._length is None or facts.max_model_len >= self._length:
            return ""
        return (
            f"takes sequences of {facts.max_model_len} tokens, and prompt and completion have up to {self._length}: "
            f"start it with --max-model-len {self._length}, or lower max_target_length or max_new_tokens"
        )

    async def _watch(self) -> None:
        """Look for servers that are away, and end the wait for them in time."""
        while self.ended is None:
            await asyncio.gather(*(self._look_again(server) for server in self.members if server.state == "away"))
            self._wait_or_end()
            await asyncio.sleep(LOOK_SECONDS)

    def _watched(self, task: asyncio.Task[None]) -> None:
        """Draw no more where nobody watches, and say by what that ended."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.ended = error
            self._tell()

    async def _look_again(self, server: Server) -> None:
        url = server.client.url
        if not self._servers.running(url):
            self._note(server, f"its process has ended.{self._last_words(url)}")
            if not self._servers.restart(url):
                self._give_up(server, "is not started again")
        elif isinstance(facts := await self._look(server), Facts):
            if short := self._short(facts):
                self._give_up(server, short)
            else:
                self._note(server, "is back, and waits for weights")

    def _wait_or_end(self) -> None:
        states = {server.state for server in self.members}
        if states & {"ready", "taking", "fresh"}:
            self._nobody_since = None
            return
        self._nobody_since = self._nobody_since or time.monotonic()
        if states == {"gone"}:
            self.end("no server is left")
        elif time.monotonic() - self._nobody_since > self._wait:
            self.end(f"no server was left, and none came back within {self._wait:g} s (vllm_wait)")

    def _give_up(self, server: Server, why: str) -> None:
        server.state = "gone"
        self._note(server, f"{why}, and is not asked any more")

    def _note(self, server: Server, what: str) -> None:
        """Keep for the last words what happened, and say it."""
        self._history.append(f"{time.strftime('%H:%M:%S')} {server.client.url}: {what}")
        self._say(f"vLLM server {server.client.url}: {what}")

    def _last_words(self, url: str) -> str:
        words = self._servers.failure(url).strip()
        return f" {words[0].upper()}{words[1:]}" if words else ""

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

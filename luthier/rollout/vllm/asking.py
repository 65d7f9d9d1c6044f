"""Which server a completion is asked of, for how long, and whether the answer is one.

Left out on purpose: who is there (``fleet``), and what an answer may look like at all (``client``).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from luthier.rollout.vllm.client import Answer, Asked, Failure
from luthier.rollout.vllm.fleet import Fleet, Server

MOST_AT_ONCE = 1024
"""Completions that one server draws at a time; the others wait here, where its failure does not reach them."""
MOST_TRIES = 5
"""Failures that one completion may be part of: it may be what the servers fail by."""


class Turn(NamedTuple):
    """A completion's place at a server, which has it in hand: ``since`` when in the server's versions."""

    server: Server
    lost: asyncio.Event
    since: int


class Asking:
    """Asks a fleet for completions. To be made and used on its event loop."""

    def __init__(self, fleet: Fleet, timeout: float) -> None:
        """Take the fleet; a server that is to draw and does nothing for ``timeout`` seconds is late."""
        self._fleet, self._timeout = fleet, timeout
        self._waiting: deque[tuple[int, asyncio.Future[Turn]]] = deque()
        fleet.listen(self._match)

    async def complete(self, asked: Asked, request: int, *, first: bool = False) -> Answer:
        """Return a completion, of whichever server draws it; ``first`` lets it go before all that wait for one.

        Raises RunError where no server is left to draw it.
        """
        tries = asks = 0
        while True:
            turn = await self._turn(request, first)
            try:
                answer = await self._ask(turn, replace(asked, name=f"{asked.name}-{asks}"))
                if answer is not None and _is_whole(answer, turn):
                    turn.server.strikes = 0
                    return answer
            except Failure as failure:
                tries += 1
                self._fleet.lose(turn.server, failure)
                if tries == MOST_TRIES:
                    self._fleet.end(f"one completion failed {tries} times, the last time by {failure}")
            finally:
                turn.server.hold(request, -1)
                self._match()
            asks, first = asks + 1, True

    async def _ask(self, turn: Turn, asked: Asked) -> Answer | None:
        """Return what a server answers, None where it was lost meanwhile by something else. Raises Failure."""
        server, lost, begun = turn.server, turn.lost, time.monotonic()
        drawing = asyncio.ensure_future(server.client.generate(asked))
        losing = asyncio.ensure_future(lost.wait())
        either: list[asyncio.Future[Any]] = [drawing, losing]
        try:
            while not (drawing.done() or lost.is_set()):
                # Weights are taken between tokens, and for as long as that takes nothing is drawn.
                quiet = 0.0 if server.state == "taking" else time.monotonic() - max(begun, server.heard)
                if quiet >= self._timeout:
                    what = f"no completion came for {self._timeout:g} s (vllm_timeout)"
                    raise Failure(server.client.url, what, "late")
                await asyncio.wait(either, timeout=self._timeout - quiet, return_when=asyncio.FIRST_COMPLETED)
            if lost.is_set():
                return None
            server.heard = time.monotonic()
            return drawing.result()
        finally:
            drawing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else looks
            for each in either:
                each.cancel()

    async def _turn(self, request: int, first: bool) -> Turn:
        """Return a place at a server that is ready, once there is one for this."""
        waiting: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)((request, waiting))
        self._match()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                waiting.result().server.hold(request, -1)
                self._match()
            raise

    def _match(self) -> None:
        """Give servers to whoever waits longest: the one with least to do, and of such one that reads the prompt."""
        while self._waiting:
            request, waiting = self._waiting[0]
            if not waiting.done():
                if self._fleet.ended is not None:
                    waiting.set_exception(self._fleet.ended)
                elif (server := self._best(request)) is not None:
                    server.hold(request, 1)
                    waiting.set_result(Turn(server, server.lost, len(server.versions) - 1))
                else:
                    return
            self._waiting.popleft()

    def _best(self, request: int) -> Server | None:
        free = [each for each in self._fleet.members if each.state == "ready" and each.drawing < MOST_AT_ONCE]
        return min(free, key=lambda each: (each.drawing, -each.reading[request]), default=None)


def _is_whole(answer: Answer, turn: Turn) -> bool:
    """Say whether a completion came to its end, or was broken off by new weights, as is asked of some.

    Raises Failure where it cannot be the answer: its tokens have to be drawn by the weights that the server had when it
    was asked, or by ones that it was given since, in their order.
    """
    server = turn.server
    given = server.versions[turn.since :]
    if answer.finish == "cancelled":
        if len(given) > 1:
            return False
        raise Failure(server.client.url, "it broke off a completion that nobody took back", "wrong")
    order = {version: place for place, version in enumerate(given)}
    unasked = [int(version) for version in np.unique(answer.versions_T) if int(version) not in order]
    if unasked:
        what = f"tokens drawn by version {unasked[0]} of the weights, where it has {given[-1]}"
        raise Failure(server.client.url, what, "wrong")
    if (np.diff([order[int(version)] for version in answer.versions_T]) < 0).any():
        raise Failure(server.client.url, "tokens drawn by older weights after ones drawn by newer ones", "wrong")
    return True

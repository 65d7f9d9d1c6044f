"""The one thread that owns the engine, and its border with the event loop.

The event loop puts what it wants of the engine into an inbox; between two steps of the engine the thread does it, and
hands what a step gave back to the loop in one call. Everything else here, the counts included, belongs to the loop's
thread alone, so that there are no locks.

Left out on purpose: scheduling. The engine admits in the order of arrival; here is only a bound on what may wait.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier.commands.server.job import Job
from luthier.commands.server.refusal import Refusal
from luthier.errors import UserError
from luthier.rollout.engine import Completion, Piece, Request, SteppedEngine

RETRY_AFTER = 1
"""Seconds after which a client may knock again at a full queue."""


class Item(NamedTuple):
    """Something that was sampled for the prompt at ``place`` of its ticket."""

    place: int
    what: Piece | Completion


class Ticket:
    """A job under way, as whoever waits for it sees it. ``accepted`` is done when the engine has taken it."""

    def __init__(self, job: Job):
        self.job = job
        self.completions = len(job.requests) * job.samples
        self.unfinished = self.completions
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items: asyncio.Queue[Item | Refusal] = asyncio.Queue()
        self._waiting = {(place, sample) for place in range(len(job.requests)) for sample in range(job.samples)}

    async def items(self) -> AsyncIterator[Item]:
        """Yield what is sampled, until all is finished. Raises Refusal where that cannot be."""
        unfinished = self.completions
        while unfinished:
            item = await self._items.get()
            if isinstance(item, Refusal):
                raise item
            unfinished -= isinstance(item.what, Completion)
            yield item

    def receive(self, item: Item) -> int:
        """Take an item in; return how many completions this shows to wait no more (0 or 1)."""
        self.unfinished -= isinstance(item.what, Completion)
        self._items.put_nowait(item)
        key = (item.place, item.what.sample)
        begun = key in self._waiting
        self._waiting.discard(key)
        return int(begun)

    def fail(self, refusal: Refusal) -> int:
        """End the ticket; return how many of its completions were still waiting."""
        if not self.accepted.done():
            self.accepted.set_exception(refusal)
            self.accepted.exception()  # whoever went away before has no use for it
        self._items.put_nowait(refusal)
        waiting = len(self._waiting)
        self._waiting.clear()
        return waiting


class Worker:
    """The thread and its inbox. Made, started and used within a running event loop.

    ``failure`` is the exception that ended the thread, if one did; ``on_failure`` is called then.
    """

    def __init__(self, engine: SteppedEngine, mesh: Mesh, max_queue: int, on_failure: Callable[[], None]):
        self.max_queue = max_queue
        self.failure: BaseException | None = None
        self.draining = False
        self._on_failure = on_failure
        self._engine = engine
        self._mesh = mesh
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._open: set[Ticket] = set()
        self._waiting = 0
        self._thread.start()

    # What the event loop calls.

    def submit(self, job: Job) -> Ticket:
        """Hand a job to the engine and return its ticket. Raises Refusal where the queue is full or the server ends."""
        self._check_state()
        ticket = Ticket(job)
        if ticket.completions > self.max_queue:
            problem = (
                f"{ticket.completions} completions in one request: this server takes {self.max_queue} at most "
                "(max_queue)."
            )
            raise Refusal(problem, "n" if job.samples > 1 else job.field)
        if self._waiting + ticket.completions > self.max_queue:
            problem = f"{self._waiting} completions are waiting, of {self.max_queue} that may. Try again later."
            raise Refusal(problem, status=429, code="queue_full", retry_after=RETRY_AFTER)
        self._waiting += ticket.completions
        self._open.add(ticket)
        self._inbox.put(partial(self._admit, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free what an open ticket holds; without effect on one that is finished."""
        if ticket in self._open:
            self._inbox.put(partial(self._cancel, ticket))

    def abandon(self) -> None:
        """End all that is open, as the server ends."""
        for ticket in list(self._open):
            self._inbox.put(partial(self._cancel, ticket))
            self._fail(ticket, Refusal("the server was stopped before this was finished.", status=503))

    async def stop(self, patience: float) -> None:
        """End the thread after the step it is in, waiting for it no longer than ``patience`` seconds."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, patience)

    def _check_state(self) -> None:
        if self.failure:
            raise Refusal("the engine has failed; the server ends.", status=500)
        if self.draining:
            raise Refusal("the server is being stopped.", status=503, retry_after=RETRY_AFTER)

    def _take_in(self, found: Sequence[tuple[Ticket, Item]]) -> None:
        for ticket, item in found:
            self._waiting -= ticket.receive(item)
            if not ticket.unfinished:
                self._open.discard(ticket)

    def _accept(self, ticket: Ticket) -> None:
        if not ticket.accepted.done():
            ticket.accepted.set_result(None)

    def _fail(self, ticket: Ticket, refusal: Refusal) -> None:
        if ticket in self._open:
            self._waiting -= ticket.fail(refusal)
            self._open.discard(ticket)

    def _fail_all(self, failure: BaseException) -> None:
        self.failure = failure
        for ticket in list(self._open):
            self._fail(ticket, Refusal("the engine has failed; the server ends.", status=500))
        self._on_failure()

    # What the thread runs.

    def _run(self) -> None:
        self._places: dict[int, tuple[Ticket, int]] = {}
        self._unfinished: dict[int, int] = {}
        try:
            with mesh_lib.use(self._mesh):
                while self._do_what_is_asked():
                    self._hand_out(self._engine.step())
        except BaseException as failure:  # whatever it is: those who wait must hear of it, and `run` raises it
            self._call(self._fail_all, failure)

    def _do_what_is_asked(self) -> bool:
        """Empty the inbox, and wait at it as long as there is nothing to sample. False is the end."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _admit(self, ticket: Ticket) -> None:
        try:
            for request in ticket.job.requests:
                self._check(request)
        except UserError as error:
            self._call(self._fail, ticket, Refusal(str(error), ticket.job.field))
            return
        for place, request in enumerate(ticket.job.requests):
            number = self._engine.submit(request)
            self._places[number] = (ticket, place)
            self._unfinished[number] = request.samples
        self._call(self._accept, ticket)

    def _check(self, request: Request) -> None:
        """Raise UserError for what the engine cannot serve, or not without a larger cache, for which all would wait."""
        self._engine.check(request)
        length = self._engine.length
        if length is not None and len(request.prompt) >= length:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, and prompt and completion together have {length} here, "
                "which is what this server has memory for (kv_cache_gib). Shorten the prompt."
            )

    def _cancel(self, ticket: Ticket) -> None:
        for number in [number for number, (owner, _) in self._places.items() if owner is ticket]:
            self._engine.cancel(number)

    def _hand_out(self, sampled: Sequence[Piece | Completion]) -> None:
        found = []
        for what in sampled:
            ticket, place = self._places[what.request]
            found.append((ticket, Item(place, what)))
            if isinstance(what, Completion):
                self._unfinished[what.request] -= 1
                if not self._unfinished[what.request]:
                    del self._places[what.request], self._unfinished[what.request]
        if found:
            self._call(self._take_in, found)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the event loop call a function, unless it is over: ``stop`` does not wait for a long step."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

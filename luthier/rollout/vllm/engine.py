"""vLLM servers as an engine: requests go out over HTTP, and nothing comes back that they did not ask for.

Every sample is a request of its own, so that it can be asked of another server alone; its noise follows from its seed,
but tokens also depend, by rounding, on what a server happens to draw beside it.

Left out on purpose: tokens before their completion is whole, since only then it is known to be one; and vLLM's cache of
prompts, which servers keep as long as the weights that have read them.
"""

from __future__ import annotations

import itertools
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from luthier import processes
from luthier.config.vllm import COLDEST
from luthier.errors import RunError, UserError
from luthier.model.param import Tree
from luthier.rollout import checks
from luthier.rollout.engine import Completion, Piece, Request, drive
from luthier.rollout.vllm.asking import Asking
from luthier.rollout.vllm.client import Answer, Asked, Client
from luthier.rollout.vllm.fleet import Fleet, Servers
from luthier.rollout.vllm.loop import Loop
from luthier.rollout.vllm.pieces import NOTHING, completion, pieces
from luthier.rollout.vllm.sending import Send

STEP_SECONDS = 0.5
"""The longest that a step waits for a completion, so that whoever drives the engine may do something else."""

Key = tuple[int, int]


class VllmEngine:
    """An ``Engine`` and a ``SteppedEngine`` over vLLM servers. A ``with`` closes it.

    In a run of several processes the first one alone speaks to servers. ``in_turn`` says that all processes drive it
    in the same steps, in the thread that ``sync`` is called in too. Else the first process's alone does, in any thread,
    and ``mend`` has to be called now and then where ``sync`` is.
    """

    def __init__(
        self,
        servers: Servers | None,
        send: Send,
        params: Tree,
        *,
        vocab_size: int,
        tokenizer: Any = None,
        length: int | None = None,
        seed: int = 0,
        version: int = 0,
        timeout: float = 600.0,
        wait: float = 600.0,
        interval: int = 1,
        in_turn: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Wait for the servers, at most ``wait`` seconds, and give them ``params`` as ``version``.

        The first process alone speaks to servers, and closes them with the engine, and where this raises.
        ``length`` is the most tokens of prompt and completion, None for what the servers take. A server that draws
        nothing for ``timeout`` seconds has failed; where none is left, ``wait`` seconds pass before that is final.
        Servers are sent every ``interval``-th version. ``say`` is told, in another thread, what becomes of servers.

        Raises RunError where the servers do not come, or do not take the weights, and UserError where they take fewer
        tokens than ``length``.
        """
        self._servers = servers if processes.is_first() else None
        self._send, self._tokenizer, self._seed = send, tokenizer, seed
        self._vocab_size, self._interval, self._in_turn = vocab_size, interval, in_turn
        self._params, self._version = params, version
        self._numbers, self._run = itertools.count(), uuid.uuid4().hex[:12]
        self._under_way: dict[Key, Future[None] | None] = {}
        self._cancelled: list[Key] = []
        self._answers: queue.SimpleQueue[tuple[Key, Answer | Exception]] = queue.SimpleQueue()
        self._taking: tuple[list[Client], list[Client]] = [], []
        self._loop = Loop("vllm")
        if self._servers is not None:
            self._fleet, self._asking = self._loop.call(self._assembled(self._servers, length, timeout, wait, say))
        try:
            most = processes.by_first(lambda: self._loop.call(self._fleet.open()))
            self._length = most if length is None else length
            self._spread(patient=False)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """The version of the weights that are sampled from."""
        return self._sent_version

    def sync(self, params: Tree, version: int = 0, *, now: bool = False) -> None:
        """Take these weights; ``now``, or where it is their turn, sample from them. All processes call it together.

        They are kept until the next ones, for servers that come back: what ``params`` refers to has to stay. What is
        being drawn goes on with them, or begins again, as ``send`` has it. Raises RunError where no server takes them.
        """
        self._params, self._version = params, version
        if now or version - self._sent_version >= self._interval:
            self._spread()

    def mend(self) -> None:
        """Give the newest weights to servers that have come back, if there are any. All processes call it together."""
        if processes.by_first(lambda: self._fleet.fresh):
            self._spread()

    @property
    def length(self) -> int | None:
        """The most tokens that prompt and completion have together."""
        return self._length

    @property
    def busy(self) -> bool:
        """Whether anything was asked for that has not come out of a step."""
        return bool(self._under_way or self._cancelled)

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be served."""
        checks.check(request, self._vocab_size, self._length, self._tokenizer is not None)
        how = request.sampling
        if 0 < how.temperature < COLDEST:
            raise UserError(f"temperature={how.temperature}: vLLM takes 0 (the likeliest token) or {COLDEST} and more.")
        if how.logprobs and how.filtered:
            raise UserError(
                f"logprobs={how.logprobs}: vLLM tells the likeliest tokens of what top_k, top_p and min_p have left "
                "alone. Leave those out, or set rollout_engine=local."
            )

    def submit(self, request: Request, *, first: bool = False) -> int:
        """Take a request and return its number; with ``first`` it goes before all that wait. Raises as ``check``."""
        self.check(request)
        number, how = next(self._numbers), request.sampling
        limit = min(how.max_new_tokens, self._length - len(request.prompt))
        # As the embedded engine has it: by the request's seed, else by the engine's and all that it was asked before.
        named = [0, self._seed, number] if how.seed is None else [1, how.seed]
        words = [word for value in named for word in (value % 2**32, value >> 32)]
        for sample in reversed(range(request.samples)) if first else range(request.samples):
            high, low = np.random.SeedSequence([sample, *words]).generate_state(2).tolist()
            own = replace(how, seed=(high << 32 | low) >> 1, max_new_tokens=limit)
            asked = Asked(f"{self._run}-{number}-{sample}", request.prompt, own, self._send.adapter)
            key, drawing = (number, sample), None
            if self._servers is not None:
                drawing = self._loop.start(self._draw(key, asked, first))
            self._under_way[key] = drawing
        return number

    def cancel(self, number: int) -> None:
        """End what is unfinished of a request; it comes out of the next step as cancelled, without tokens."""
        keys = [key for key in self._under_way if key[0] == number]
        for key in keys:
            drawing = self._under_way.pop(key)
            if drawing is not None:
                drawing.cancel()
        self._cancelled += keys

    def step(self) -> list[Piece | Completion]:
        """Wait for a while and return what came, pieces before completions; possibly nothing.

        Raises RunError where no server is left that could draw what was asked for.
        """
        cancelled, self._cancelled = self._cancelled, []
        ended = [completion(*key, NOTHING) for key in cancelled]
        if not self._under_way:
            return [*ended]

        def hear() -> tuple[list[tuple[Key, Answer]], bool]:
            return self._hear(0.0 if cancelled else STEP_SECONDS), self._fleet.fresh

        heard, fresh = processes.by_first(hear) if self._in_turn else hear()
        if fresh and self._in_turn:
            self._spread()
        new: list[Piece | Completion] = []
        for key, answer in heard:
            del self._under_way[key]
            new += pieces(*key, answer)
            ended.append(completion(*key, answer))
        return [*new, *ended]

    def forget(self) -> None:
        """Do nothing: what servers have kept was read by the weights that they have, and gives the same again."""

    def generate(
        self, requests: Sequence[Request], on_piece: Callable[[Piece], None] | None = None
    ) -> Iterator[Completion]:
        """Yield each completion as it is finished; see ``engine.Engine``."""
        for request in requests:
            self.check(request)
        return drive(self, requests, on_piece)

    def close(self) -> None:
        """End what is under way, and the servers that are the run's own."""
        if self._servers is None:
            self._loop.close()
        else:
            self._loop.close(self._fleet.close())
            self._servers.close()

    def __enter__(self) -> VllmEngine:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""
        self.close()

    async def _assembled(
        self, servers: Servers, length: int | None, timeout: float, wait: float, say: Callable[[str], None]
    ) -> tuple[Fleet, Asking]:
        def client(url: str) -> Client:
            return Client(url, api_key=servers.api_key, timeout=timeout, vocab_size=self._vocab_size)

        fleet = Fleet(servers, client, length=length, wait=wait, say=say)
        return fleet, Asking(fleet, timeout)

    def _spread(self, *, patient: bool = True) -> None:
        """Bring the newest weights to all servers that have others or none; again where none of them took them.

        Not ``patient``, raises RunError where any of them does not.
        """
        ready = False
        while not ready:
            some, whole = processes.by_first(self._take)
            if not some:
                return
            stale, fresh = self._taking
            call = self._loop.call
            self.sent = self._send(self._params, self._version, stale, fresh, whole=whole, call=call)
            self._sent_version = self._version
            ready = processes.by_first(lambda: self._taken(patient))

    def _take(self) -> tuple[bool, bool]:
        """Take the servers that are to have new weights; say whether there are some, and some without any."""
        stale, fresh = self._taking = self._loop.call(self._fleet.take(self._version))
        return bool(stale or fresh), bool(fresh)

    def _taken(self, patient: bool) -> bool:
        failed = self.sent.failed
        if failed and not patient:
            told = "; ".join(str(failure) for failure in failed.values())
            raise RunError(f"the vLLM servers did not take the weights: {told}.")
        return self._loop.call(self._fleet.taken(failed))

    async def _draw(self, key: Key, asked: Asked, first: bool) -> None:
        """Put a completion where ``step`` finds it, or what became of it."""
        try:
            self._answers.put((key, await self._asking.complete(asked, key[0], first=first)))
        except Exception as error:  # raised again by the step, which is in another thread
            self._answers.put((key, error))

    def _hear(self, seconds: float) -> list[tuple[Key, Answer]]:
        """Return the answers that are there, or after some seconds; none that was cancelled."""
        until, heard = time.monotonic() + seconds, []
        while True:
            try:
                key, answer = self._answers.get(timeout=0.0 if heard else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return heard
            if key in self._under_way and isinstance(answer, Exception):
                raise answer
            if key in self._under_way:
                heard.append((key, answer))

"""When a step's completions are sampled: in turn with training, or ahead of it on devices of their own.

In turn, each step is sampled by the very weights that it then changes. Ahead, a thread samples on its own mesh while
the trainer works: the weights it uses are at most ``staleness`` steps behind those that its completions will train, new
ones are taken up as soon as they are there, in the middle of completions too, and every token knows its version.

Left out on purpose: engines in other processes, whose weights are sent (``feed_apart``).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import jax

from luthier import mesh as mesh_lib
from luthier.model.param import Tree
from luthier.train.sampler import Collected, Sampler

Question = Callable[[Sampler, Callable[[], None] | None], Any]
"""Called with the sampler and with what is to be called between chunks of tokens."""


class Feed(Protocol):
    """Where the loop's completions come from."""

    def next(self) -> Collected:
        """Return the completions of the next step."""
        ...

    def publish(self, trained: Tree, version: int, *, now: bool = False) -> None:
        """Sample from what is trained after ``version`` steps from now on. The caller may then donate it.

        An engine that is sent weights now and then has them at once with ``now``.
        """
        ...

    def ask(self, question: Question) -> Any:
        """Return what ``question`` says of the sampler with the weights published last."""
        ...

    def close(self) -> None:
        """Stop sampling."""
        ...


class InTurn:
    """Samples when asked, on the trainer's own mesh and weights.

    ``weights`` makes the sampler's weights of those that are trained.
    """

    def __init__(self, sampler: Sampler, weights: Callable[[Tree], Tree], number: int, position: int) -> None:
        """Begin with step ``number``, whose prompts begin at ``position``."""
        self._sampler, self._weights, self._number, self._position = sampler, weights, number, position

    def next(self) -> Collected:
        """Return the completions of the next step."""
        collected = self._sampler.collect(self._number, self._position)
        self._number, self._position = self._number + 1, collected.position
        return collected

    def publish(self, trained: Tree, version: int, *, now: bool = False) -> None:
        """Sample from these weights from now on."""
        self._sampler.engine.sync(self._weights(trained), version)

    def ask(self, question: Question) -> Any:
        """Return what ``question`` says of the sampler."""
        return question(self._sampler, None)

    def close(self) -> None:
        """Do nothing."""


class Ahead:
    """Samples steps ``number`` to ``last`` in a thread, on the sampler's mesh, which is apart from the trainer's.

    ``weights`` makes the sampler's weights, there, of those that are trained.
    """

    def __init__(
        self,
        sampler: Sampler,
        weights: Callable[[Tree], Tree],
        number: int,
        last: int,
        position: int,
        staleness: int,
    ) -> None:
        self._sampler, self._weights, self._staleness = sampler, weights, staleness
        self._steps, self._position = range(number, last + 1), position
        self._changed = threading.Condition()
        self._version = number - 1
        self._fresh: tuple[Tree, int] | None = None
        self._ready: deque[Collected] = deque()
        self._asked: deque[tuple[Question, Future[Any]]] = deque()
        self._failure: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    def next(self) -> Collected:
        """Return the completions of the next step, waiting for them; raises what sampling them raised."""
        found = self.take(None)
        assert found is not None
        return found

    def take(self, seconds: float | None) -> Collected | None:
        """Return the completions of the next step, or None where they are not there within some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure, seconds)
            if self._ready:
                return self._ready.popleft()
            if self._failure:
                raise self._failure
        return None

    def publish(self, trained: Tree, version: int, *, now: bool = False) -> None:
        """Copy the weights to the sampler's devices, from where it takes them up after its present chunk of tokens."""
        copied = jax.block_until_ready(self._weights(trained))
        with self._changed:
            self._fresh, self._version = (copied, version), version
            self._changed.notify_all()

    def reach(self, version: int) -> None:
        """Hear that the engine was given the weights of this version by someone else."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def ask(self, question: Question) -> Any:
        """Return what ``question`` says of the sampler, after the step that it is sampling now."""
        return self.put(question).result()

    def put(self, question: Question) -> Future[Any]:
        """Have a question answered after the step that is being sampled now, and return the promise of it."""
        answer: Future[Any] = Future()
        with self._changed:
            if self._failure:
                raise self._failure
            self._asked.append((question, answer))
            self._changed.notify_all()
        return answer

    def close(self) -> None:
        """Stop sampling after the present chunk of tokens."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            with mesh_lib.use(self._sampler.mesh):
                for number in self._steps:
                    self._serve_until(lambda oldest=number - 1 - self._staleness: self._version >= oldest)
                    collected = self._sampler.collect(number, self._position, between=self._between)
                    self._position = collected.position
                    with self._changed:
                        self._ready.append(collected)
                        self._changed.notify_all()
                self._serve_until(lambda: False)
        except _Closed:
            pass
        except BaseException as error:
            with self._changed:
                self._failure = error
                for _, answer in self._asked:
                    answer.set_exception(error)
                self._changed.notify_all()

    def _serve_until(self, ready: Callable[[], bool]) -> None:
        """Answer questions, and return when it is time for the next step."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._asked or ready())
            self._between()  # before a question is taken: where this raises, whoever asked is told
            with self._changed:
                asked = self._asked.popleft() if self._asked else None
            if asked is None:
                return
            question, answer = asked
            try:
                answer.set_result(question(self._sampler, self._between))
            except Exception as error:
                answer.set_exception(error)

    def _between(self) -> None:
        """Take up new weights, or stop: called before a step and between chunks of tokens."""
        with self._changed:
            if self._closing:
                raise _Closed
            fresh, self._fresh = self._fresh, None
        if fresh is not None:
            self._sampler.engine.sync(*fresh)


class _Closed(Exception):
    """The trainer wants no more."""

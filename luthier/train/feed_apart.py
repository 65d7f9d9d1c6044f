"""The feeds of an engine in other processes, which weights are sent to: sampling in turn with training, or ahead of it.

Weights are sent by the trainer's thread, since what is split over devices is gathered by all processes together.
In turn, all processes drive the engine in the same steps. Ahead, a thread of the first one alone does, and the others
are told what it collected.

Left out on purpose: the sending (``rollout.vllm``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Protocol, TypeVar

from luthier import processes
from luthier.model.param import Tree
from luthier.train.feed import Ahead, InTurn, Question
from luthier.train.sampler import Collected, Sampler

MEND_SECONDS = 1.0
"""Between two looks at whether a server has come back and is to be given weights."""

T = TypeVar("T")


class Apart(Protocol):
    """An engine in other processes; see ``rollout.vllm.engine``."""

    @property
    def version(self) -> int:
        """The version of the weights that are sampled from."""
        ...

    def sync(self, params: Tree, version: int = 0, *, now: bool = False) -> None:
        """Take these weights; ``now``, or where it is their turn, sample from them."""
        ...

    def mend(self) -> None:
        """Give the newest weights to what has come back without any."""
        ...


class ApartInTurn(InTurn):
    """Samples when asked, from the weights that were sent last."""

    def __init__(self, sampler: Sampler, engine: Apart, number: int, position: int) -> None:
        """Begin with step ``number``, whose prompts begin at ``position``."""
        super().__init__(sampler, lambda trained: trained, number, position)
        self._engine = engine

    def publish(self, trained: Tree, version: int, *, now: bool = False) -> None:
        """Send these weights, if it is time to."""
        self._engine.sync(trained, version, now=now)


class ApartAhead:
    """Samples steps ``number`` to ``last`` in a thread of the first process; ``sampler`` is ``alone``."""

    def __init__(self, sampler: Sampler, engine: Apart, number: int, last: int, position: int, staleness: int) -> None:
        """Begin with step ``number``, whose prompts begin at ``position``."""
        self._engine, self._answer = engine, Future[Any]()
        self._ahead: Ahead | None = None
        if processes.is_first():
            self._ahead = Ahead(sampler, lambda trained: trained, number, last, position, staleness)

    def next(self) -> Collected:
        """Return the completions of the next step, waiting for them; raises what sampling them raised."""
        return self._told(lambda: self._own.take(MEND_SECONDS))

    def publish(self, trained: Tree, version: int, *, now: bool = False) -> None:
        """Send these weights, if it is time to, while completions are under way."""
        self._engine.sync(trained, version, now=now)
        if self._ahead is not None:
            self._ahead.reach(self._engine.version)

    def ask(self, question: Question) -> Any:
        """Return what ``question`` says of the sampler, after the step that it is sampling now."""
        processes.by_first(lambda: self._put(question))
        (answer,) = self._told(self._answered)
        return answer

    def close(self) -> None:
        """Stop sampling."""
        if self._ahead is not None:
            self._ahead.close()

    @property
    def _own(self) -> Ahead:
        if self._ahead is None:
            raise RuntimeError("only the first process samples")
        return self._ahead

    def _put(self, question: Question) -> None:
        self._answer = self._own.put(question)

    def _answered(self) -> tuple[Any] | None:
        done, _ = wait([self._answer], MEND_SECONDS)
        return (self._answer.result(),) if done else None

    def _told(self, look: Callable[[], T | None]) -> T:
        """Return what the first process finds; while it finds nothing, servers that come back are given weights.

        The trainer's weights are whole now, since nobody trains while this waits.
        """
        while (found := processes.by_first(look)) is None:
            self._engine.mend()
        return found

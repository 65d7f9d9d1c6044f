"""What every engine takes and gives: token ids in, token ids out.

Left out on purpose: text. Prompts are rendered and completions decoded at the edges (``rollout.text``); an engine looks
at text only to find stop strings, with the tokenizer it was given for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from luthier.model.param import Tree

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a completion are drawn, and when it ends.

    Logits are divided by ``temperature`` (0: the likeliest token is taken); of that softmax remain the ``top_k``
    likeliest tokens (0: all), of those the likeliest that together reach ``top_p`` of what remained, of those the ones
    with at least ``min_p`` of the likeliest one's probability. Tokens as likely as the last one kept are kept too.

    A completion ends after ``max_new_tokens``, with one of ``stop_token_ids``, or with the token that completes one of
    the texts ``stop``; that last token is part of it. The same ``seed`` gives the same draws whatever else is sampled
    beside it; None takes fresh noise at each call. ``logprobs`` is the number of likeliest tokens to report beside
    each token drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int = 0

    @property
    def filtered(self) -> bool:
        """Whether tokens may be left out of what is drawn from."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Request:
    """A prompt and how many completions of it are wanted, of which of the engine's ``adapter``s ("": of none)."""

    prompt: Sequence[int]
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str = ""


class Alternatives(NamedTuple):
    """The A likeliest tokens at each position, likeliest first, and their log-probs before filtering."""

    ids_TA: np.ndarray
    logp_TA: np.ndarray


@dataclass(frozen=True)
class Completion:
    """One finished completion: ``tokens_T`` int32, and two fp32 log-probs of each token drawn.

    ``logp_T`` is under the distribution that it was drawn from, filters and all (0 where temperature is 0);
    ``softmax_logp_T`` under the whole softmax at that temperature (at 1 where temperature is 0), which is what a
    trainer computes. ``versions_T`` int32 is the version of the weights that each token was drawn by, as ``sync`` was
    told. ``request`` and ``sample`` count from 0. ``finish`` is "stop" for a stop token or text, ``stopped_by`` being
    which.

    ``routes_TLk`` int16 are the experts that prompt and completion were sent to by each layer that has any, when they
    were read last: all but the last token, which nothing has read. None where that is not recorded, or was cancelled.
    """

    request: int
    sample: int
    tokens_T: np.ndarray
    logp_T: np.ndarray
    softmax_logp_T: np.ndarray
    versions_T: np.ndarray
    finish: Finish
    stopped_by: int | str | None = None
    alternatives: Alternatives | None = None
    routes_TLk: np.ndarray | None = None


@dataclass(frozen=True)
class Piece:
    """The next tokens of a completion that is still being drawn; arrays as in ``Completion``.

    They come from one chunk, and so from one ``version`` of the weights.
    """

    request: int
    sample: int
    tokens_T: np.ndarray
    logp_T: np.ndarray
    softmax_logp_T: np.ndarray
    version: int = 0
    alternatives: Alternatives | None = None


class Engine(Protocol):
    """Something that samples from a model."""

    def sync(self, params: Tree, version: int = 0) -> None:
        """Sample from these weights from now on; tokens drawn by them carry the ``version``."""
        ...

    def generate(
        self, requests: Sequence[Request], on_piece: Callable[[Piece], None] | None = None
    ) -> Iterator[Completion]:
        """Yield each completion as it is finished, in no order.

        ``on_piece`` is called with the new tokens of each completion, the last ones included, as they come. Raises
        UserError for a request that cannot be served, before the first is begun. Closing the iterator ends the rest.
        """
        ...


class CheckedEngine(Engine, Protocol):
    """One that says beforehand what it cannot serve."""

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be served."""
        ...


class SteppedEngine(Protocol):
    """An engine that is driven from outside: requests may come and go between its steps, and its weights change."""

    def sync(self, params: Tree, version: int = 0) -> None:
        """Sample from these weights from now on; tokens drawn by them carry the ``version``."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        ...

    @property
    def length(self) -> int | None:
        """The most tokens that prompt and completion have together, None where nothing limits them."""
        ...

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be served."""
        ...

    def submit(self, request: Request, *, first: bool = False) -> int:
        """Take a request and return its number; with ``first`` it goes before all that wait. Raises as ``check``."""
        ...

    def step(self) -> Sequence[Piece | Completion]:
        """Go on for a while and return what came of it, pieces before completions."""
        ...

    def cancel(self, number: int) -> None:
        """End what is unfinished of a request; it comes out of a step as cancelled."""
        ...

    def forget(self) -> None:
        """Forget what was read before: the next requests are served as by an engine that has just been made."""
        ...


def check_idle(engine: SteppedEngine) -> None:
    """Raise RuntimeError where an engine is busy: what comes out of its steps is somebody else's."""
    if engine.busy:
        raise RuntimeError("the engine is busy with other requests: take their completions first")


def drive(
    engine: SteppedEngine, requests: Sequence[Request], on_piece: Callable[[Piece], None] | None = None
) -> Iterator[Completion]:
    """Yield the completions of requests by an engine's steps, as ``Engine.generate`` does of such as are checked."""
    check_idle(engine)
    numbers: dict[int, int] = {}
    try:
        for index, request in enumerate(requests):
            numbers[engine.submit(request)] = index
        while engine.busy:
            for event in engine.step():
                event = replace(event, request=numbers[event.request])
                if isinstance(event, Completion):
                    yield event
                elif on_piece is not None:
                    on_piece(event)
    finally:
        for number in numbers:
            engine.cancel(number)
        if engine.busy:  # with telling that these were cancelled
            engine.step()

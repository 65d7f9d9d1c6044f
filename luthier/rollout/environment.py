"""What answers the model: an environment takes the tokens of a turn and gives an observation, a reward, or the end.

There are two levels. ``Environment`` is what episodes are played with: tokens in, tokens out. ``TextEnvironment`` is
what to subclass: the text of a turn in, a text or messages out. Either way the model's own tokens are scored as they
were drawn; text is made of them to be looked at, never to be tokenised again.

An environment is made anew for each completion, so it may keep what it likes on itself; what is expensive to make is
best made with the first step. Left out on purpose: closing environments, and sharing things between them, which a
module of the user's own can do.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from luthier.data import functions
from luthier.data.chat import Rendering
from luthier.errors import UserError, did_you_mean
from luthier.rollout import text
from luthier.rollout.prompts import Prompt
from luthier.rollout.text import Message

KEY = "environment"
BUILT_IN = {"calculator": "luthier.rollout.calculator.Calculator"}
"""The environments that have names, and where they are."""


@dataclass(frozen=True)
class Observation:
    """What comes back for a turn: ``tokens`` for the model to go on from, and a part of the reward, if any.

    The episode ends if it is ``done``, or if there are no tokens; the tokens of one that is done are not used.
    """

    tokens: Sequence[int] = ()
    reward: float | None = None
    done: bool = False


class Environment(Protocol):
    """What an episode is played with.

    ``stop`` are texts that end a turn, as the model's end tokens do. ``quick`` promises that a call takes no time that
    counts: it is then made between two steps of the engine, in an order that is always the same, which makes sampling
    reproducible to the bit. Others are called in threads while the engine goes on, several at a time.
    """

    stop: Sequence[str]
    quick: bool

    def reset(self, prompt: Prompt) -> Sequence[int] | None:
        """Begin, and return the tokens of a prompt of its own, or None for the row's.

        A group's completions share their prompt, so it must follow from ``prompt`` alone.
        """
        ...

    def step(self, tokens_T: np.ndarray) -> Observation:
        """Take the tokens of the model's next turn, its last one included, and return what they lead to.

        The last call of an episode may be with a turn that the limit on tokens cut off.
        """
        ...


class SingleTurn:
    """The model replies, and that is all: what there is without an environment."""

    stop: Sequence[str] = ()
    quick = True

    def reset(self, prompt: Prompt) -> None:
        """Take the row's own prompt."""

    def step(self, tokens_T: np.ndarray) -> Observation:
        """End the episode."""
        return Observation(done=True)


@dataclass(frozen=True)
class Edge:
    """Where tokens become text and text becomes tokens: the tokenizer, the chat template, and the end tokens."""

    tokenizer: Any
    how: Rendering
    end_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Answer:
    """What a ``TextEnvironment`` answers to a turn.

    The model goes on either right behind ``text``, within its reply; or with a new reply to ``messages``, such as
    ``[{"role": "user", "content": "Higher."}]``, which the chat template renders. Without either the episode ends, as
    it does if it is ``done``.
    """

    text: str = ""
    messages: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False


class TextEnvironment(abc.ABC):
    """An environment in terms of text: subclass it and write ``answer``, and ``start`` if there is something to begin.

    A subclass with an ``__init__`` of its own takes the edge first, hands it on, and then has its settings:
    ``def __init__(self, edge, size=10): super().__init__(edge)``. ``stop`` and ``quick`` are as in ``Environment``.
    """

    stop: Sequence[str] = ()
    quick = False

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def start(self, prompt: Prompt) -> Sequence[Message] | None:
        """Begin an episode; return messages to ask the model in place of the row's own, or None."""
        return None

    @abc.abstractmethod
    def answer(self, reply: str) -> Answer:
        """Return the answer to a turn of the model, given as text: no end token, no special tokens, stop texts kept."""

    def reset(self, prompt: Prompt) -> Sequence[int] | None:
        """Begin, as ``Environment`` says."""
        own = self.start(prompt)
        self._asked, self._tools = prompt.messages if own is None else own, prompt.tools
        return None if own is None else text.encode(self._edge.tokenizer, self._edge.how, own, prompt.tools)

    def step(self, tokens_T: np.ndarray) -> Observation:
        """Answer a turn, as ``Environment`` says."""
        edge, ids = self._edge, np.asarray(tokens_T).tolist()
        ended = ids[-1] if ids[-1] in edge.end_tokens else None
        answer = self.answer(text.decode_tokens(edge.tokenizer, ids, ended))
        if answer.text and answer.messages:
            raise ValueError("the answer has both a text and messages: give one of them")
        tokens = text.encode_more(edge.tokenizer, answer.text) if answer.text else []
        if answer.messages and not answer.done:
            tokens = text.encode_answer(
                edge.tokenizer, edge.how, self._asked, self._tools, answer.messages, ids[-1] if ids else None
            )
        return Observation(tokens, answer.reward, answer.done)


def load(path: str, settings: Mapping[str, Any], edge: Edge) -> Callable[[], Environment]:
    """Return what makes an environment for each completion: the class at ``path``, called with the edge and settings.

    ``path`` is a built-in name, ``package.module.Class`` or ``path/to/file.py:Class``; empty is ``SingleTurn``. Raises
    UserError where there is none, where it does not take the settings, or is no environment.
    """
    if not path:
        return SingleTurn
    if path not in BUILT_IN and ":" not in path and "." not in path:
        hint = did_you_mean(path, list(BUILT_IN)) or f" There is {', '.join(BUILT_IN)}."
        raise UserError(f"{KEY}={path}: no built-in environment.{hint} For your own: {functions.REMEDY}")
    make = functions.load(BUILT_IN.get(path, path), KEY)
    try:
        inspect.signature(make).bind(edge, **settings)
    except TypeError as error:
        raise UserError(f"{KEY}={path}: it cannot be made with environment_kwargs={dict(settings)}: {error}.") from None
    try:
        probe = make(edge, **settings)
    except Exception as error:
        # The class is the user's: whatever it raises is about itself or its settings.
        reason = f"{type(error).__name__}: {error}.{functions.line_of(error)}"
        raise UserError(f"{KEY}={path}: making it with environment_kwargs={dict(settings)} failed: {reason}") from error
    lacking = [name for name in ("reset", "step", "stop", "quick") if not hasattr(probe, name)]
    if lacking:
        raise UserError(f"{KEY}={path}: no environment: it lacks `{lacking[0]}`. Subclass TextEnvironment.")
    return functools.partial(make, edge, **settings)


def openings(make: Callable[[], Environment], asked: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens that each episode begins with: the environment's own prompt, or else the row's, from ``ids``.

    So that lengths are known before a run starts, each prompt is begun once for it. Raises UserError naming one that
    the environment cannot begin with.
    """
    found = []
    for prompt, tokens in zip(asked, ids, strict=True):
        try:
            own = make().reset(prompt)
        except Exception as error:  # whatever a stranger's class raises
            reason = f"{type(error).__name__}: {error}.{functions.line_of(error)}"
            raise UserError(f"{prompt.place}: {KEY} cannot begin with this row: {reason}") from error
        found.append(list(tokens if own is None else own))
    return found

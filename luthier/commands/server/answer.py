"""Completions as JSON: whole answers and streams of chunks, for both kinds of endpoint.

An answer reports log-probs of every token drawn, the end token included, so that there are as many as
``usage.completion_tokens`` counts. They are the engine's under the whole softmax at the request's temperature.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.commands.server.job import Job, Served
from luthier.commands.server.refusal import Refusal
from luthier.commands.server.words import Word
from luthier.commands.server.worker import Item, Ticket
from luthier.rollout import text
from luthier.rollout.engine import Completion, Piece

LEAST_LOGPROB = -9999.0
"""What OpenAI reports for less than that; JSON has no infinity."""


@dataclass(frozen=True)
class Token:
    """One drawn token as answers show it, where in the text it begins, and the likeliest tokens at its place."""

    word: Word
    logprob: float
    offset: int
    likeliest: list[tuple[Word, float]]


@dataclass(frozen=True)
class Kind:
    """What tells the two endpoints' answers apart.

    ``whole`` and ``part`` make the changing part of a choice from its text; ``opening`` is the first part of each
    choice of a stream, where there is one.
    """

    prefix: str
    object: str
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    logprobs: Callable[[list[Token]], dict[str, Any]]
    opening: dict[str, Any] | None = None


class Choice:
    """One completion on its way into an answer: what of its text and tokens is still to be shown."""

    def __init__(self, index: int, job: Job, served: Served, words: Callable[[int], Word]):
        after = job.requests[index // job.samples].prompt if job.goes_on else ()
        ends = job.sampling.stop_token_ids
        self.index = index
        self.tokens = 0
        self._logprobs = job.logprobs
        self._words = words
        self._shown = text.TextStream(served.tokenizer, job.sampling.stop, ends, after)
        self._counted = text.TextStream(served.tokenizer, (), ends, after)
        self._offset = 0

    def push(self, piece: Piece | Completion) -> tuple[str, list[Token]]:
        """Return the text that the next tokens complete, and the tokens themselves if they are wanted."""
        ids = piece.tokens_T.tolist()
        self.tokens += len(ids)
        return self._shown.push(ids), list(self._read(piece, ids)) if self._logprobs else []

    def close(self) -> str:
        """Return the text that was held back till the end."""
        return self._shown.close()

    def _read(self, piece: Piece | Completion, ids: list[int]) -> Iterator[Token]:
        logprobs = np.maximum(piece.softmax_logp_T, LEAST_LOGPROB).tolist()
        likeliest: list[list[tuple[Word, float]]] = [[] for _ in ids]
        if piece.alternatives is not None:
            ids_TA, logp_TA = piece.alternatives
            rows = zip(ids_TA.tolist(), np.maximum(logp_TA, LEAST_LOGPROB).tolist(), strict=True)
            likeliest = [[(self._words(token), logp) for token, logp in zip(*row, strict=True)] for row in rows]
        for token, logprob, others in zip(ids, logprobs, likeliest, strict=True):
            yield Token(self._words(token), logprob, self._offset, others)
            self._offset += len(self._counted.push([token]))


def _completion_logprobs(tokens: list[Token]) -> dict[str, Any]:
    def top(token: Token) -> dict[str, float]:
        """Map texts to log-probs, the likeliest first; of tokens that read alike the likelier is told."""
        others = {word.text: logprob for word, logprob in reversed(token.likeliest)}
        return dict(sorted((others | {token.word.text: token.logprob}).items(), key=lambda item: -item[1]))

    asked = any(token.likeliest for token in tokens)
    return {
        "tokens": [token.word.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": list(map(top, tokens)) if asked else None,
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprobs(tokens: list[Token]) -> dict[str, Any]:
    def entry(word: Word, logprob: float) -> dict[str, Any]:
        return {"token": word.text, "logprob": logprob, "bytes": word.bytes}

    content = [
        entry(token.word, token.logprob) | {"top_logprobs": [entry(*each) for each in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


TEXT = Kind(
    prefix="cmpl-",
    object="text_completion",
    chunk="text_completion",
    whole=lambda words: {"text": words},
    part=lambda words: {"text": words},
    logprobs=_completion_logprobs,
)
CHAT = Kind(
    prefix="chatcmpl-",
    object="chat.completion",
    chunk="chat.completion.chunk",
    whole=lambda words: {"message": {"role": "assistant", "content": words, "refusal": None}},
    part=lambda words: {"delta": {"content": words} if words else {}},
    logprobs=_chat_logprobs,
    opening={"delta": {"role": "assistant", "content": ""}},
)


class Answer:
    """What a ticket gives, as JSON of one kind."""

    def __init__(self, kind: Kind, ticket: Ticket, created: int, served: Served, words: Callable[[int], Word]):
        job = ticket.job
        self._kind, self._ticket, self._job = kind, ticket, job
        self._head = {"id": kind.prefix + uuid.uuid4().hex, "created": created, "model": job.model}
        self._choices = [Choice(index, job, served, words) for index in range(ticket.completions)]

    async def whole(self) -> dict[str, Any]:
        """Return the answer once all is finished. Raises Refusal."""
        done: dict[int, dict[str, Any]] = {}
        async for item in self._ticket.items():
            if isinstance(item.what, Completion):
                choice = self._choice(item)
                words, tokens = choice.push(item.what)
                content = self._kind.whole(words + choice.close())
                done[choice.index] = self._entry(choice, content, tokens, _finish(item.what))
        choices = [done[index] for index in sorted(done)]
        return {**self._head, "object": self._kind.object, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events; what goes wrong on the way is the last one."""
        for choice in self._choices if self._kind.opening else ():
            yield self._event([self._entry(choice, self._kind.opening or {}, [], None)])
        try:
            async for item in self._ticket.items():
                choice = self._choice(item)
                if isinstance(item.what, Completion):
                    content = self._kind.part(choice.close())
                    yield self._event([self._entry(choice, content, [], _finish(item.what))])
                    continue
                words, tokens = choice.push(item.what)
                if words or tokens:
                    yield self._event([self._entry(choice, self._kind.part(words), tokens, None)])
        except Refusal as refusal:
            yield _as_event(refusal.body())
            return
        if self._job.include_usage:
            yield self._event([], self._usage())
        yield b"data: [DONE]\n\n"

    def _choice(self, item: Item) -> Choice:
        return self._choices[item.place * self._job.samples + item.what.sample]

    def _entry(
        self, choice: Choice, content: dict[str, Any], tokens: list[Token], finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._kind.logprobs(tokens) if tokens else None
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        counted = {"usage": usage} if self._job.include_usage else {}
        return _as_event({**self._head, "object": self._kind.chunk, "choices": choices, **counted})

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self._job.requests)
        completion = sum(choice.tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _finish(completion: Completion) -> str:
    if completion.finish == "cancelled":
        raise Refusal("the completion was cancelled.", status=503)
    return completion.finish


def _as_event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

"""What a request's body asks of the engine: bodies in, engine requests out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.commands.server import schema
from luthier.commands.server.refusal import Refusal
from luthier.commands.server.schema import Body, ChatBody, CompletionBody
from luthier.data import schemas
from luthier.data.chat import Rendering
from luthier.data.schemas import RowError
from luthier.errors import UserError
from luthier.rollout import text
from luthier.rollout.engine import Request, Sampling


@dataclass(frozen=True)
class Served:
    """The model as requests meet it: its name, how text becomes tokens, and what holds where a request says nothing.

    ``reply_tokens`` is then the length of a chat's reply at most; None stands for that of ``sampling``. ``adapters``
    are the names of the engine's, each a model of its own to requests.
    """

    name: str
    created: int
    tokenizer: Any
    rendering: Rendering
    sampling: Sampling
    vocab_size: int
    reply_tokens: int | None = None
    adapters: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """All names that a request may have as its model."""
        return (self.name, *self.adapters)


@dataclass(frozen=True)
class Job:
    """Engine requests that are answered together: one for each prompt, with the same sampling and samples.

    ``model`` is the name that was asked for, ``field`` the field of the body that prompts stand in; ``goes_on`` says
    that completions go on from the text of their prompts, as a reply does not; ``logprobs`` says whether the answer
    shows them.
    """

    model: str
    requests: tuple[Request, ...]
    field: str
    goes_on: bool
    stream: bool
    include_usage: bool
    logprobs: bool

    @property
    def samples(self) -> int:
        """The completions of each prompt."""
        return self.requests[0].samples

    @property
    def sampling(self) -> Sampling:
        """How all of them are sampled."""
        return self.requests[0].sampling


def read_completion(data: bytes, served: Served) -> Job:
    """Return what a body of `/v1/completions` asks for. Raises Refusal."""
    body = schema.read(CompletionBody, data)
    named = adapter(body.model, served)
    sampling = _sampling(body, body.max_tokens, body.logprobs or 0, served)
    prompts = [_encoded(prompt, place, served) for place, prompt in enumerate(body.prompt)]
    requests = tuple(Request(prompt, body.n, sampling, named) for prompt in prompts)
    usage = body.stream_options.include_usage
    return Job(body.model, requests, "prompt", True, body.stream, usage, body.logprobs is not None)


def read_chat(data: bytes, served: Served) -> Job:
    """Return what a body of `/v1/chat/completions` asks for. Raises Refusal."""
    body = schema.read(ChatBody, data)
    named = adapter(body.model, served)
    max_tokens = body.max_completion_tokens or body.max_tokens or served.reply_tokens
    sampling = _sampling(body, max_tokens, body.top_logprobs or 0, served)
    try:
        conversation = schemas.read_messages({"messages": [message.turn() for message in body.messages]})
        prompt = text.encode(served.tokenizer, served.rendering, conversation.messages)
    except RowError as error:
        raise Refusal(f"`messages`: {error.problem}", "messages") from None
    except UserError as error:
        raise Refusal(str(error), "messages") from None
    goes_on, usage = not served.rendering.use_chat_template, body.stream_options.include_usage
    requests = (Request(prompt, body.n, sampling, named),)
    return Job(body.model, requests, "messages", goes_on, body.stream, usage, body.logprobs)


def adapter(model: str, served: Served) -> str:
    """Return what the engine calls the adapter that a request calls ``model``, "" for the base. Raises Refusal."""
    if model in served.models:
        return "" if model == served.name else model
    *others, last = (f"`{name}`" for name in served.models)
    those = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    problem = f"the model `{schema.short(model)}` is not served here. {those}."
    raise Refusal(problem, "model", status=404, code="model_not_found")


def _sampling(body: Body, max_tokens: int | None, logprobs: int, served: Served) -> Sampling:
    """Return the server's own sampling with what the body says in its place; its stop tokens come on top."""
    _check_ids(body.stop_token_ids, "stop_token_ids", served)
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else min(max(body.top_k, 0), served.vocab_size),
        "min_p": body.min_p,
        "seed": None if body.seed is None else body.seed % 2**64,  # clients may give negative ones
        "max_new_tokens": max_tokens,
        "stop": None if body.stop is None else tuple(body.stop),
    }
    ends = () if body.ignore_eos else served.sampling.stop_token_ids
    return replace(
        served.sampling,
        **{name: value for name, value in given.items() if value is not None},
        stop_token_ids=tuple(dict.fromkeys([*ends, *body.stop_token_ids])),
        logprobs=logprobs,
    )


def _encoded(prompt: str | list[int], place: int, served: Served) -> list[int]:
    if isinstance(prompt, str):
        prompt = text.encode_text(served.tokenizer, prompt)
        if not prompt:
            raise Refusal(f"`prompt`: the text at place {place} has no tokens. Give at least one.", "prompt")
    else:
        _check_ids(prompt, "prompt", served)
    return prompt


def _check_ids(ids: Sequence[int], field: str, served: Served) -> None:
    for token in ids:
        if not 0 <= token < served.vocab_size:
            problem = f"`{field}`: {token} is no token of this model, whose ids are 0 to {served.vocab_size - 1}."
            raise Refusal(problem, field)

"""The bodies of `/v1/completions` and `/v1/chat/completions`: OpenAI's fields, and vLLM's for further sampling.

A field that is null is a field left out, as OpenAI has it. Left out on purpose: tools, penalties, and the rest of
``NEUTRAL``. They are refused by name, unless their value asks for what happens anyway, as many clients send it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from luthier.commands.server.refusal import Refusal
from luthier.errors import did_you_mean

LABELS = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"})
"""Fields that say who asks and change no answer: they are read over."""

REPORTS = frozenset({"annotations", "reasoning_content", "refusal"})
"""Fields of answers that come back within a conversation and that no prompt is made from: they are read over."""

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": [],
    "bad_words": [[]],
    "echo": [False],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "include_stop_str_in_output": [False],
    "length_penalty": [1],
    "logit_bias": [{}],
    "min_tokens": [0],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "presence_penalty": [0],
    "prompt_logprobs": [],
    "reasoning_effort": [],
    "repetition_penalty": [1],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "skip_special_tokens": [True],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "use_beam_search": [False],
    "verbosity": [],
    "web_search_options": [],
}
"""Fields of OpenAI's and vLLM's that are not followed, each with the values at which there is nothing to follow."""

_SIZES = {
    "model_type": "should be an object",
    "string_too_long": "should have {max_length} characters at most",
    "string_too_short": "should not be empty",
    "too_long": "should have {max_length} items at most, not {actual_length}",
    "too_short": "should not be empty",
}
"""What is wrong with a value, in our words, by pydantic's name of it: there, each least size is 1."""

MAX_N = 128
MAX_STOPS = 64
StopText = Annotated[str, Field(min_length=1, max_length=256)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_prompts(value: Any) -> list[str | list[int]]:
    """Return the prompts of a completion, each a text or a list of token ids."""
    if isinstance(value, str) or (_is_list(value) and value and all(map(_is_id, value))):
        return [value]
    if _is_list(value) and value and all(isinstance(prompt, str) for prompt in value):
        return value
    if _is_list(value) and value and all(_is_list(prompt) and prompt and all(map(_is_id, prompt)) for prompt in value):
        return value
    raise ValueError("should be a text, a list of token ids, or a list of texts or of such lists, none of them empty")


def _fit_for_division(temperature: float) -> float:
    """Keep logits that are divided by it within single precision."""
    if temperature and not 1e-6 <= temperature <= 1e3:
        raise ValueError("should be 0, or from 0.000001 to 1000")
    return temperature


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Fields(BaseModel):
    """What all objects share: exact types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream is to hold besides the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Part(Fields):
    """A part of a message's content. Only text can be read."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # for caches that have to be told; this one does not


class Message(Fields):
    """A turn of a conversation. Nulls, of which answers that are sent back have many, are fields left out, as are
    ``REPORTS``.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_read_over(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None and name not in REPORTS}

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise _refused("content", "is missing")
        return self

    def turn(self) -> dict[str, Any]:
        """Return the message as the data schemas read it."""
        words = {"content": "".join(part.text for part in self.content)} if self.content is not None else {}
        # "developer" is OpenAI's later name for the role that templates know as "system".
        role = "system" if self.role == "developer" else self.role
        return self.model_dump(exclude_none=True) | words | {"role": role}


class Body(Fields):
    """The fields that both kinds of completion have. None stands for what the server was started with."""

    model: str
    n: int = Field(1, ge=1, le=MAX_N)
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[float, AfterValidator(_fit_for_division)] | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] | None = None
    stop_token_ids: list[int] = Field([], max_length=MAX_STOPS)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _check_best(self) -> Body:
        if self.best_of not in (None, self.n):
            raise _refused("best_of", f"is done here as `n`={self.n} alone: leave it out")
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> Body:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise _refused("stream_options", "is for streams alone: set `stream` to true, or leave it out")
        return self


class CompletionBody(Body):
    """The body of `/v1/completions`."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)


class ChatBody(Body):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise _refused("top_logprobs", "needs `logprobs` set to true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise _refused("max_completion_tokens", f"contradicts `max_tokens`={self.max_tokens}: keep one")
        return self


B = TypeVar("B", bound=Body)


def read(model: type[B], data: bytes) -> B:
    """Return the body in ``data``, the JSON of a request. Raises Refusal naming the first field that does not fit."""
    try:
        fields = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refusal("the body is not a JSON object")
    try:
        return model.model_validate(dict(_followed(fields)))
    except ValidationError as error:
        raise _explained(model, error) from None


def _followed(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields that are given and followed. Raises Refusal for one that asks for what is not done here."""
    for name, value in fields.items():
        if value is None or name in LABELS:
            continue
        if name not in NEUTRAL:
            yield name, value
        elif value not in NEUTRAL[name]:
            raise Refusal(f"`{name}`={_shown(value)}: this server does not support it. Leave it out.", name)


def _refused(param: str, problem: str) -> pydantic_core.PydanticCustomError:
    return pydantic_core.PydanticCustomError("refused", "{problem}", {"param": param, "problem": problem})


def _explained(model: type[Body], error: ValidationError) -> Refusal:
    first = error.errors()[0]
    context = first.get("ctx", {})
    place = [*first["loc"], *([context["param"]] if first["type"] == "refused" else [])]
    name = short(str(place[0]))
    param = short(name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:]))
    if first["type"] == "refused":
        return Refusal(f"`{param}` {context['problem']}.", param)
    if first["type"] == "missing":
        return Refusal(f"`{param}` is missing.", param)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(name, list(model.model_fields)) if len(place) == 1 else ""
        return Refusal(f"unknown field `{param}`.{hint}", param)
    if first["type"] in _SIZES:
        return Refusal(f"`{param}` {_SIZES[first['type']].format(**context)}.", param)
    problem = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Refusal(f"`{param}`={_shown(first['input'])}: {problem}.", param)


def short(text: str) -> str:
    """Return a text that a client chose, so long as it may be in a message."""
    return text if len(text) <= 80 else text[:77] + "..."


def _shown(value: Any) -> str:
    return short(pydantic_core.to_json(value).decode())

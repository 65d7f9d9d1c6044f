"""What bodies may hold: each field that does not fit is named, and what clients send by habit is taken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.commands.server import schema
from luthier.commands.server.refusal import Refusal
from luthier.commands.server.schema import ChatBody, CompletionBody

TEXT = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def refused(model: type, body: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        schema.read(model, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", "10", "should be a valid integer"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", 1.5, "integer"),
        ("max_tokens", True, "integer"),
        ("temperature", -1, "`temperature`=-1: should be 0, or from 0.000001 to 1000"),
        ("temperature", 1e-30, "should be 0, or"),
        ("temperature", 1e30, "should be 0, or"),
        ("temperature", "hot", "number"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("top_k", -2, "-1"),
        ("min_p", 2, "1"),
        ("n", 0, "1"),
        ("n", 129, "128"),
        ("seed", 1.5, "integer"),
        ("seed", 2**63, "less than"),
        ("stop", 3, "list"),
        ("stop", [""], "`stop[0]` should not be empty"),
        ("stop", ["a" * 257], "`stop[0]` should have 256 characters at most"),
        ("stop", ["a"] * 65, "`stop` should have 64 items at most, not 65"),
        ("stop_token_ids", ["a"], "integer"),
        ("stop_token_ids", [1] * 65, "64"),
        ("ignore_eos", "yes", "boolean"),
        ("stream", 1, "boolean"),
        ("stream_options", {"include_usage": True}, "is for streams alone"),
        ("logprobs", 21, "20"),
        ("logprobs", True, "integer"),
        ("prompt", 3, "should be a text, a list of token ids"),
        ("prompt", [], "none of them empty"),
        ("prompt", [[]], "none of them empty"),
        ("prompt", ["a", 1], "list of texts"),
        ("prompt", [True], "list of texts"),
        ("model", 1, "string"),
        ("echo", True, "does not support it"),
        ("best_of", 2, "is done here as `n`=1 alone"),
        ("logit_bias", {"5": 1}, "does not support it"),
        ("suffix", "x", "does not support it"),
        ("frequency_penalty", 0.5, "does not support it"),
        ("repetition_penalty", 1.1, "does not support it"),
        ("temprature", 1, "unknown field `temprature`. Did you mean `temperature`?"),
        ("messages", [], "unknown field `messages`"),
    ],
)
def test_a_field_that_does_not_fit_is_named(field: str, value: Any, words: str) -> None:
    refusal = refused(CompletionBody, TEXT | {field: value})
    assert refusal.param is not None
    assert refusal.param.partition("[")[0] == field
    assert f"`{field}" in refusal.message
    assert words in refusal.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "`messages` should not be empty"),
        ({"messages": ["hi"]}, "messages[0]", "`messages[0]` should be an object"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "is missing"),
        ({"messages": [*CHAT["messages"], {"role": "user"}]}, "messages[1].content", "is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "list"),
        ({"messages": [{"role": "user", "content": "a", "nme": "b"}]}, "messages[0].nme", "unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "b"}}]}, "messages[0].audio", "unknown"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "contradicts `max_tokens`=3"),
        ({"tools": [{"type": "function"}]}, "tools", "does not support it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not support it"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
        ({"prompt": "a"}, "prompt", "unknown field"),
    ],
)
def test_a_field_of_a_chat_that_does_not_fit_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    refusal = refused(ChatBody, CHAT | fields)
    assert refusal.param == param
    assert param in refusal.message
    assert words in refusal.message


@pytest.mark.parametrize(("model", "field"), [(CompletionBody, "prompt"), (ChatBody, "messages"), (ChatBody, "model")])
def test_a_missing_field_is_named(model: type, field: str) -> None:
    body = {name: value for name, value in (TEXT | CHAT).items() if name in model.model_fields and name != field}
    refusal = refused(model, body)
    assert (refusal.param, refusal.message) == (field, f"`{field}` is missing.")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": NaN}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_what_is_no_object_is_refused(body: bytes, words: str) -> None:
    assert words in refused(CompletionBody, body).message


def test_a_long_value_is_not_repeated_in_full() -> None:
    assert len(refused(CompletionBody, TEXT | {"max_tokens": "9" * 10_000}).message) < 200
    assert len(refused(CompletionBody, TEXT | {"x" * 1_000_000: 1}).message) < 200


def test_what_asks_for_nothing_is_taken() -> None:
    habits = {"user": "me", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    habits |= {"echo": False, "suffix": None, "logprobs": None, "stop": None, "seed": None, "n": None}
    assert schema.read(CompletionBody, json.dumps(TEXT | habits).encode()) == CompletionBody(**TEXT)
    habits = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "metadata": {}}
    assert schema.read(ChatBody, json.dumps(CHAT | habits).encode()) == ChatBody(**CHAT)


def test_what_clients_add_and_changes_nothing_is_read_over() -> None:
    added = {"n": 2, "best_of": 2, "stream": True, "stream_options": {"include_obfuscation": False}}
    assert schema.read(CompletionBody, json.dumps(TEXT | added).encode()).n == 2
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    added = {"messages": [{"role": "user", "content": [part]}], "prompt_cache_retention": "24h"}
    (message,) = schema.read(ChatBody, json.dumps(CHAT | added).encode()).messages
    assert message.turn() == {"role": "user", "content": "a"}


def test_whole_numbers_are_numbers() -> None:
    body = schema.read(CompletionBody, json.dumps(TEXT | {"temperature": 1, "top_p": 1, "stop": "x"}).encode())
    assert (body.temperature, body.top_p, body.stop) == (1.0, 1.0, ["x"])

"""A dataset's row -> ``Conversation``: one function for each schema, and a table of them.

Left out on purpose: files and row numbers (``rows``), chat templates and tokens (``chat``). Parts of a message that are
not text (images, audio) are refused, not skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import UserError, did_you_mean
from luthier.types import Conversation

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that datasets give the speaker of a turn, and what chat templates call it."""


class RowError(ValueError):
    """What is wrong with one row, in which column, and the remedy. Whoever knows the row's place adds it."""

    def __init__(self, column: str, problem: str):
        super().__init__(f"column `{column}`: {problem}" if column else problem)
        self.column = column
        self.problem = problem


@dataclass(frozen=True)
class Schema:
    """The columns that a kind of row must have, those it may have, and the function that reads it."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Conversation]


@dataclass(frozen=True)
class Selection:
    """A schema and, for each of its columns, the dataset's own name for it; optional ones may be missing in rows."""

    schema: str
    columns: tuple[tuple[str, str], ...]

    @property
    def required(self) -> tuple[str, ...]:
        """The dataset's columns that every row must have."""
        columns = dict(self.columns)
        return tuple(columns[name] for name in SCHEMAS[self.schema].required)

    def described(self, known: Sequence[str]) -> str:
        """Return the columns that are read, of which optional ones are told if they are ``known`` to be there."""
        told = [(name, column) for name, column in self.columns if column in self.required or column in known]
        return ", ".join(column if name == column else f"{column} as {name}" for name, column in told)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation in ``row``. Raises RowError naming the dataset's column."""
        schema, columns = SCHEMAS[self.schema], dict(self.columns)
        for name in schema.required:
            if columns[name] not in row:
                raise RowError(columns[name], f"missing in this row, which has {_listed(row)}.")
        try:
            return schema.read({name: row.get(column) for name, column in columns.items()})
        except RowError as error:
            raise RowError(columns.get(error.column, error.column), error.problem) from None
        except RecursionError:
            raise RowError("", "lists or mappings are nested too deeply in it. Fix or remove the row.") from None


def read_messages(row: Mapping[str, Any]) -> Conversation:
    """``messages``: turns of ``role``, ``content``, ``tool_calls`` and whatever else; ``tools`` beside it."""
    return Conversation(messages=_turns(row["messages"], "messages"), tools=_tools(row.get("tools")))


def read_sharegpt(row: Mapping[str, Any]) -> Conversation:
    """``conversations``: turns of ``from`` and ``value``; a ``function_call`` turn becomes a tool call."""
    return Conversation(messages=_turns(row["conversations"], "conversations"), tools=_tools(row.get("tools")))


def read_prompt(row: Mapping[str, Any]) -> Conversation:
    """``prompt`` and ``completion``: each a text or a list of messages; the completion alone is trained."""
    prompt = _side(row["prompt"], "prompt", "user")
    completion = _side(row["completion"], "completion", "assistant")
    return Conversation(prompt + completion, _tools(row.get("tools")), prompt_messages=len(prompt))


def read_question(row: Mapping[str, Any]) -> Conversation:
    """``question`` and ``answer``: one exchange of texts."""
    return _exchange(_text(row["question"], "question"), _text(row["answer"], "answer"))


def read_instruction(row: Mapping[str, Any]) -> Conversation:
    """``instruction``, ``input`` (may be empty or null, then left out) and ``output``, as in Alpaca."""
    instruction = _text(row["instruction"], "instruction")
    extra = "" if row.get("input") is None else _text(row["input"], "input")
    request = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return _exchange(request, _text(row["output"], "output"))


def read_text(row: Mapping[str, Any]) -> Conversation:
    """``text``: plain text for continued pre-training."""
    return Conversation(text=_text(row["text"], "text"))


SCHEMAS: dict[str, Schema] = {
    "messages": Schema(("messages",), ("tools",), read_messages),
    "conversations": Schema(("conversations",), ("tools",), read_sharegpt),
    "prompt": Schema(("prompt", "completion"), ("tools",), read_prompt),
    "question": Schema(("question", "answer"), (), read_question),
    "instruction": Schema(("instruction", "output"), ("input",), read_instruction),
    "text": Schema(("text",), (), read_text),
}
"""The schemas, in the order in which a dataset's columns are tried."""


def recognise(columns: Sequence[str] | Mapping[str, str]) -> Selection | None:
    """Return the first schema whose required columns are all among ``columns``, or None.

    ``columns`` are the dataset's, or a mapping from a schema's onto them. Optional columns are read from whatever row
    has them: the columns of a JSON Lines file are known from its first rows alone.
    """
    mapping = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    for name, schema in SCHEMAS.items():
        if all(column in mapping for column in schema.required):
            free = [column for column in schema.optional if column in mapping or column not in mapping.values()]
            pairs = [(column, mapping.get(column, column)) for column in (*schema.required, *free)]
            return Selection(name, tuple(pairs))
    return None


def select(wanted: Sequence[str] | Mapping[str, str] | None, columns: Sequence[str], source: str) -> Selection:
    """Return how to read rows with ``columns``, as the key ``train_data_columns`` asks for or else as recognised.

    ``wanted`` is a list of columns, or a mapping from a schema's column to the dataset's. A schema's optional columns
    are read wherever the dataset has them. Raises UserError for a column that is not in ``source``, which names what
    is there, and for names that make no schema.
    """
    if not wanted:
        found = recognise(columns)
        if found is None:
            raise UserError(
                f"{source}: no known schema among its columns {_listed(columns)}. Known: {_known_schemas()}. Set "
                'train_data_columns to a mapping such as {"prompt": "...", "completion": "..."} onto its columns.'
            )
        return found
    for name in wanted.values() if isinstance(wanted, Mapping) else wanted:
        if name not in columns:
            hint = did_you_mean(name, list(columns))
            raise UserError(f"train_data_columns: no column `{name}` in {source}, which has {_listed(columns)}.{hint}")
    found = recognise(wanted)
    if found is None:
        raise UserError(_no_schema(wanted))
    return found


def _no_schema(mapping: Sequence[str] | Mapping[str, str]) -> str:
    known = {column for schema in SCHEMAS.values() for column in schema.required + schema.optional}
    hints = [did_you_mean(name, sorted(known)) for name in mapping if name not in known]
    example = '{"prompt": "input", "completion": "output"}'
    return (
        f"train_data_columns: {_listed(mapping)} make no known schema. Known: {_known_schemas()}. "
        f"Columns of other names are mapped onto one, as in {example}.{next(filter(None, hints), '')}"
    )


def _known_schemas() -> str:
    return ", ".join("+".join(f"`{column}`" for column in schema.required) for schema in SCHEMAS.values())


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _exchange(request: str, reply: str) -> Conversation:
    messages = ({"role": "user", "content": request}, {"role": "assistant", "content": reply})
    return Conversation(messages, prompt_messages=1)


def _side(value: Any, column: str, role: str) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return _turns(value, column)


def _turns(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(column, f"{_found(value)} where a list of messages should be.")
    if not value:
        raise RowError(column, "an empty list of messages. Remove the row, or give it a conversation.")
    return tuple(_turn(turn, f"message {number}", column) for number, turn in enumerate(value, start=1))


def _turn(turn: Any, place: str, column: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(column, f"{place} is {_found(turn)}, not a mapping with `role` and `content`.")
    speaker, body = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if speaker not in turn:
        raise RowError(column, f"{place} has no `role` (nor `from`); it has {_listed(turn)}.")
    name = turn[speaker]
    if not isinstance(name, str) or name not in ROLES:
        hint = did_you_mean(str(name), list(ROLES))
        raise RowError(column, f"{place} has an unknown role {name!r}. Known: {', '.join(ROLES)}.{hint}")
    message = {key: item for key, item in turn.items() if key not in (speaker, body, "tool_calls") and item is not None}
    calls = turn.get("tool_calls")
    if name == "function_call":
        message["tool_calls"] = _parsed_calls(turn.get(body), place, column)
        return {"role": "assistant", "content": ""} | message
    if calls:
        message["tool_calls"] = _calls(calls, place, column)
    content = "" if calls and turn.get(body) is None else _content(turn.get(body), f"the `{body}` of {place}", column)
    return {"role": ROLES[name], "content": content} | message


def _content(value: Any, place: str, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "".join(_part(part, place, column) for part in value)
    raise RowError(column, f"{place} is {_found(value)} where text should be. Fix or remove the row.")


def _part(part: Any, place: str, column: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowError(column, f"{place} has a part of type {kind!r}; only text parts can be trained on.")


def _calls(value: Any, place: str, column: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as mappings, which is what chat templates print as JSON themselves."""
    if not isinstance(value, Sequence) or not all(isinstance(call, Mapping) for call in value):
        raise RowError(column, f"the `tool_calls` of {place} are {_found(value)}, not a list of mappings.")
    return [_call(_without_nulls(dict(call))) for call in value]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    target = dict(function) if isinstance(function, Mapping) else call
    arguments = target.get("arguments")
    if isinstance(arguments, str):
        parsed = _json(arguments)
        target["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return call | {"function": target} if isinstance(function, Mapping) else target


def _parsed_calls(value: Any, place: str, column: str) -> list[dict[str, Any]]:
    """Return the calls in a ``function_call`` turn: JSON of one ``{"name", "arguments"}``, or of a list of them."""
    parsed = _json(value) if isinstance(value, str) else value
    calls = [parsed] if isinstance(parsed, Mapping) else parsed
    if not isinstance(calls, list) or not calls or not all(isinstance(c, Mapping) and "name" in c for c in calls):
        raise RowError(column, f'{place} is a function_call, whose value should be JSON {{"name", "arguments"}}.')
    return [{"type": "function", "function": _call(_without_nulls(dict(call)))} for call in calls]


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str):
        parsed = _json(value) if value.strip() else []
        if parsed is None:
            raise RowError("tools", "not valid JSON. Give a list of tool definitions, or the JSON of one.")
        value = parsed
    if not value:
        return None
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools", f"{_found(value)} where a list of tool definitions should be.")
    return tuple(_without_nulls(dict(tool)) for tool in tools)


def _text(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    raise RowError(column, f"{_found(value)} where text should be. Fix or remove the row, or make the column text.")


def _json(text: str) -> Any:
    """Return the value of JSON text, or None where it is none (or is null)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without_nulls(value: Any) -> Any:
    """Drop null fields at every depth: Arrow files give each mapping in a column the keys of all the others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _found(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{shown[:57]}..." if len(shown) > 60 else f"{shown} ({type(value).__name__})"

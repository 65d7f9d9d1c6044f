import json

import pytest

from luthier.data import schemas
from luthier.data.schemas import RowError
from luthier.errors import UserError


def read(row, wanted=None):
    return schemas.select(wanted, tuple(row), "data").read(row)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


EXCHANGE = (user("a"), assistant("b"))


@pytest.mark.parametrize(
    ("row", "prompt_messages"),
    [
        ({"messages": [user("a"), assistant("b")]}, 0),
        ({"messages": [user([{"type": "text", "text": "a"}]), assistant(["b"])]}, 0),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 0),
        ({"conversations": [user("a"), assistant("b")]}, 0),
        ({"prompt": "a", "completion": "b"}, 1),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, 1),
        ({"prompt": [user("a")], "completion": "b"}, 1),
        ({"question": "a", "answer": "b"}, 1),
        ({"instruction": "a", "output": "b"}, 1),
        ({"instruction": "a", "input": "", "output": "b"}, 1),
        ({"instruction": "a", "input": None, "output": "b"}, 1),
    ],
)
def test_schema_is_recognised_and_read(row, prompt_messages):
    conversation = read(row)
    assert conversation.messages == EXCHANGE
    assert conversation.prompt_messages == prompt_messages


def test_alpaca_input_follows_the_instruction():
    assert read({"instruction": "Add", "input": "1, 2", "output": "3"}).messages[0] == user("Add\n\n1, 2")


@pytest.mark.parametrize("wanted", [None, ["instruction", "output"]])
def test_optional_columns_are_read_where_a_row_has_them(wanted):
    selection = schemas.select(wanted, ["instruction", "output"], "data")
    assert selection.read({"instruction": "a", "output": "b"}).messages == EXCHANGE
    assert selection.read({"instruction": "a", "input": "c", "output": "b"}).messages[0] == user("a\n\nc")
    messages = schemas.select(None, ["messages"], "data")
    assert messages.read({"messages": [user("a")], "tools": [{"name": "f"}]}).tools == ({"name": "f"},)


def test_column_that_is_mapped_is_not_read_twice():
    row = {"input": "a", "output": "b"}
    assert read(row, {"instruction": "input", "output": "output"}).messages == EXCHANGE


def test_columns_are_told_with_what_they_are_read_as():
    assert schemas.select(None, ["messages", "id"], "data").described(["messages", "id"]) == "messages"
    assert schemas.select(None, ["messages"], "data").described(["messages", "tools"]) == "messages, tools"
    mapped = schemas.select({"prompt": "q", "completion": "completion"}, ["q", "completion"], "data")
    assert mapped.described(["q", "completion"]) == "q as prompt, completion"


def test_text():
    conversation = read({"text": "once"})
    assert (conversation.text, conversation.messages) == ("once", ())


def test_the_more_structured_schema_wins():
    assert (
        read({"text": "t", "prompt": "p", "completion": "c", "messages": [user("a"), assistant("b")]}).messages
        == EXCHANGE
    )


@pytest.mark.parametrize("tools", [[{"name": "f", "unused": None}], json.dumps([{"name": "f"}]), {"name": "f"}])
def test_tools_reach_the_conversation(tools):
    row = {"messages": [user("a"), assistant("b")], "tools": tools}
    assert read(row).tools == ({"name": "f"},)
    assert read(row, ["messages"]).tools == ({"name": "f"},)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert read({"messages": [user("a")], "tools": tools}).tools is None


def test_tool_calls_are_kept_with_arguments_as_mappings():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "2", "tool_call_id": "1"}
    messages = read({"messages": [user("a"), turn, result]}).messages
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert messages[2] == result


def test_sharegpt_tool_turns():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    messages = read({"conversations": turns}).messages
    assert [message["role"] for message in messages] == ["system", "assistant", "tool"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_mapping_names_the_datasets_columns():
    row = {"input": "a", "output": "b", "other": 1}
    assert read(row, {"prompt": "input", "completion": "output"}).messages == EXCHANGE


@pytest.mark.parametrize(
    ("wanted", "columns", "expected"),
    [
        (
            ["mesages"],
            ["messages", "id"],
            "no column `mesages` in data, which has `messages`, `id`. Did you mean `messages`?",
        ),
        ({"prompt": "inputs", "completion": "b"}, ["input", "b"], "no column `inputs` in data"),
        (["input", "output"], ["input", "output"], "make no known schema"),
        ({"promt": "a", "completion": "b"}, ["a", "b"], "Did you mean `prompt`?"),
        (None, ["a", "b"], "no known schema among its columns `a`, `b`"),
    ],
)
def test_wrong_columns(wanted, columns, expected):
    with pytest.raises(UserError) as error:
        schemas.select(wanted, columns, "data")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("a"), assistant(None)]}, "column `messages`: the `content` of message 2 is null"),
        ({"messages": [user(5)]}, "the `content` of message 1 is 5 (int) where text should be"),
        ({"messages": [{"role": "asistant", "content": "b"}]}, "unknown role 'asistant'"),
        ({"messages": [{"role": "asistant", "content": "b"}]}, "Did you mean `assistant`?"),
        ({"messages": []}, "an empty list of messages"),
        ({"messages": "a"}, "'a' (str) where a list of messages should be"),
        ({"messages": None}, "null where a list of messages should be"),
        ({"messages": ["a"]}, "message 1 is 'a' (str), not a mapping"),
        ({"messages": [{"content": "a"}]}, "message 1 has no `role`"),
        ({"messages": [user([{"type": "image", "image": "x"}])]}, "part of type 'image'"),
        ({"messages": [user("a")], "tools": "{"}, "column `tools`: not valid JSON"),
        ({"messages": [user("a")], "tools": [1]}, "where a list of tool definitions should be"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "message 1 is a function_call"),
        ({"prompt": "a", "completion": None}, "column `completion`: null where"),
        ({"question": "a", "answer": 4}, "column `answer`: 4 (int) where text should be"),
        ({"instruction": "a", "input": 4, "output": "b"}, "column `input`: 4 (int)"),
        ({"text": ["a"]}, "column `text`: ['a'] (list) where text should be"),
    ],
)
def test_bad_rows(row, expected):
    with pytest.raises(RowError) as error:
        read(row)
    assert expected in str(error.value)


def test_bad_row_names_the_datasets_own_column():
    with pytest.raises(RowError, match="column `output`: null"):
        read({"input": "a", "output": None}, {"prompt": "input", "completion": "output"})


def test_row_that_is_nested_too_deeply():
    tool = {}
    for _ in range(100_000):
        tool = {"a": tool}
    with pytest.raises(RowError, match="nested too deeply"):
        read({"messages": [user("a")], "tools": [tool]})


def test_row_without_the_column():
    selection = schemas.select(None, ["prompt", "completion"], "data")
    with pytest.raises(RowError, match="column `completion`: missing in this row, which has `prompt`"):
        selection.read({"prompt": "a"})

"""Rows become prompts: what is asked, what is shown, and what the answer is held against."""

from __future__ import annotations

import json

import pytest

import tiny
from luthier.config import resolve
from luthier.data import files
from luthier.errors import UserError
from luthier.rollout import prompts

WORDS = tiny.tokenizer()
USER = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}


def keys(path, **more):
    listed = [f"{name}={value}" for name, value in more.items()]
    return resolve("eval", ["model_name=m", f"hf_path={path}", *listed], {})


@pytest.fixture
def rows(tmp_path):
    def make(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path, files.open_split(files.open_splits(str(path), None, None), "train", str(path), "train_split")

    return make


@pytest.mark.parametrize(
    ("row", "messages", "shown", "reference"),
    [
        ({"question": "hello", "answer": "hi"}, [USER], "hello", "hi"),
        ({"messages": [USER, REPLY]}, [USER], [SYSTEM, USER], "hi"),
        ({"messages": [USER]}, [USER], [SYSTEM, USER], None),
        ({"messages": [USER, REPLY, USER]}, [USER, REPLY, USER], [SYSTEM, USER, REPLY, USER], None),
        ({"messages": [USER, REPLY, REPLY]}, [USER], [SYSTEM, USER], "hihi"),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}, [USER],
         [SYSTEM, USER], "hi"),
        ({"prompt": "hello", "completion": "hi"}, [USER], "hello", "hi"),
        ({"prompt": [USER], "completion": [REPLY]}, [USER], [SYSTEM, USER], "hi"),
        ({"prompt": [USER, REPLY], "completion": "!"}, [USER, REPLY], [SYSTEM, USER, REPLY], "!"),
        ({"instruction": "hello", "output": "hi"}, [USER], "hello", "hi"),
        ({"prompt": "hello", "solution": "x"}, [USER], "hello", None),
        ({"prompt": [USER], "level": 3}, [USER], [SYSTEM, USER], None),
        ({"question": "hello"}, [USER], "hello", None),
    ],
)  # fmt: skip
def test_what_a_row_asks(rows, row, messages, shown, reference):
    path, opened = rows(row)
    config = keys(path)
    (prompt,) = prompts.read(opened, prompts.choose(config, opened), "be brief")
    assert list(prompt.messages) == [SYSTEM, *messages]
    assert prompt.shown == shown
    assert prompt.reference == reference
    assert prompt.row == row
    assert prompt.place == f"{path}, line 1"
    (ids,) = prompts.encode(config, [prompt], WORDS)
    assert ids == WORDS.apply_chat_template([SYSTEM, *messages], add_generation_prompt=True)["input_ids"]


def test_columns_of_other_names(rows):
    path, opened = rows({"problem": "hello", "solution": "hi"})
    (prompt,) = prompts.read(opened, prompts.choose(keys(path, train_data_columns='{"prompt": "problem"}'), opened))
    assert (prompt.shown, prompt.reference) == ("hello", None)
    mapping = '{"question": "problem", "answer": "solution"}'
    (prompt,) = prompts.read(opened, prompts.choose(keys(path, train_data_columns=mapping), opened))
    assert (prompt.shown, prompt.reference) == ("hello", "hi")


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"messages": [REPLY]}, {}, ["rows.jsonl, line 1", "nothing comes before its reply"]),
        ({"prompt": " ", "level": 1}, {}, ["rows.jsonl, line 1", "an empty prompt"]),
        ({"prompt": 3, "level": 1}, {}, ["rows.jsonl, line 1", "`prompt`", "3 (int)"]),
        ({"level": 1}, {}, ["no known schema", "`level`"]),
        ({"prompt": "a", "level": 1}, {"train_data_columns": '{"prompt": "promt"}'}, ["no column `promt`"]),
    ],
)
def test_rows_that_ask_nothing(rows, row, more, words):
    path, opened = rows(row)
    with pytest.raises(UserError) as refused:
        prompts.read(opened, prompts.choose(keys(path, **more), opened))
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_system_message_of_its_own_stays(rows):
    own = {"role": "system", "content": "own"}
    path, opened = rows({"messages": [own, USER]})
    (prompt,) = prompts.read(opened, prompts.choose(keys(path), opened), "be brief")
    assert prompt.messages == (own, USER)


def test_what_the_template_refuses_is_named_by_its_row(rows):
    path, opened = rows({"question": "a", "answer": "b"})
    config = keys(path, chat_template="{{ raise_exception('No!') }}")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1.*No!"):
        prompts.encode(config, prompts.read(opened, prompts.choose(config, opened)), WORDS)
    config = keys(path, chat_template="{# nothing #}")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: an empty prompt, of no tokens"):
        prompts.encode(config, prompts.read(opened, prompts.choose(config, opened)), WORDS)


def test_overlong_prompts_are_found():
    assert prompts.overlong([[1] * 3, [1] * 5, [1] * 4, [1] * 9], 4) == [1, 3]


def test_a_group_has_messages_where_the_prompt_has(rows):
    _, opened = rows({"messages": [USER, REPLY]})
    asked = prompts.read_row(opened[0], "row 1", prompts.Alone("messages"))
    assert prompts.group(asked, ["a"], [[5]]).completions == [[{"role": "assistant", "content": "a"}]]
    asked = prompts.read_row({"question": "q"}, "row 1", prompts.Alone("question"))
    assert prompts.group(asked, ["a"], [[5]]).completions == ["a"]

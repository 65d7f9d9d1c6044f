import json
from itertools import pairwise

import numpy as np
import pytest
import templates
from toy import byte_level, metaspace, wrap

from luthier.data import chat
from luthier.data.chat import Rendering
from luthier.data.preview import preview
from luthier.data.schemas import RowError
from luthier.errors import UserError
from luthier.types import Conversation, Example

SYSTEM = {"role": "system", "content": "be brief"}
TURNS = (
    {"role": "user", "content": "hello  world"},
    {"role": "assistant", "content": "the quick\n\nfox é 🦊"},
    {"role": "user", "content": "\n and then?"},
    {"role": "assistant", "content": " two  "},
)
TOOL_TURNS = (
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four"},
)


def encode(tokenizer, conversation, **how) -> Example:
    if isinstance(conversation, tuple):
        conversation = Conversation(conversation)
    return chat.encode(tokenizer, [conversation], Rendering(**how))[0]


def gaps(tokenizer, conversation, **how) -> tuple[str, ...]:
    rendered = chat.to_text(tokenizer, conversation, Rendering(**how))
    return chat.template_gaps(tokenizer, conversation, Rendering(**how), rendered)


def trained(tokenizer, example) -> list[str]:
    """Return the decoded stretches of trained tokens."""
    edges = [0, *(np.flatnonzero(np.diff(example.mask_T)) + 1), len(example.ids_T)]
    spans = [(a, b) for a, b in pairwise(edges) if b > a and example.mask_T[a]]
    return [tokenizer.decode(example.ids_T[a:b]) for a, b in spans]


@pytest.mark.parametrize("backend", [byte_level, metaspace])
@pytest.mark.parametrize("template", [templates.CHATML, templates.MARKED, templates.LLAMA3, templates.WITH_TOOLS])
@pytest.mark.parametrize("messages", [TURNS, (SYSTEM, *TURNS), TURNS[:2], TURNS[:1]])
def test_ids_are_those_of_transformers(backend, template, messages):
    tokenizer = wrap(backend(), template, adds_bos=True)
    expected = tokenizer.apply_chat_template(list(messages), tokenize=True)["input_ids"]
    for how in ({}, {"completion_only": False}):
        np.testing.assert_array_equal(encode(tokenizer, messages, **how).ids_T, expected)


@pytest.mark.parametrize("backend", [byte_level, metaspace])
@pytest.mark.parametrize("messages", [TURNS, (SYSTEM, *TURNS), TURNS[:2], TURNS[:1], TURNS[1:]])
def test_mask_of_marks_is_that_of_transformers(backend, messages):
    tokenizer = wrap(backend(), templates.MARKED)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = tokenizer.apply_chat_template(list(messages), tokenize=True, **options)["assistant_masks"]
    np.testing.assert_array_equal(encode(tokenizer, messages).mask_T, np.array(expected, bool))


@pytest.mark.parametrize("backend", [byte_level, metaspace])
@pytest.mark.parametrize("messages", [TURNS, (SYSTEM, *TURNS), TURNS[:2], TURNS[1:], TURNS[1:2], (*TURNS, TURNS[3])])
def test_prefixes_give_the_mask_of_marks(backend, messages):
    by_marks = encode(wrap(backend(), templates.MARKED), messages)
    by_prefixes = encode(wrap(backend(), templates.CHATML), messages)
    np.testing.assert_array_equal(by_prefixes.ids_T, by_marks.ids_T)
    np.testing.assert_array_equal(by_prefixes.mask_T, by_marks.mask_T)


def test_replies_and_end_tokens_are_trained_and_headers_are_not(tokenizer):
    assert trained(tokenizer, encode(tokenizer, TURNS)) == ["the quick\n\nfox é 🦊<|im_end|>", " two  <|im_end|>"]
    tokenizer.chat_template = templates.LLAMA3
    assert trained(tokenizer, encode(tokenizer, TURNS)) == ["the quick\n\nfox é 🦊<|eot|>", "two<|eot|>"]
    tokenizer.chat_template = templates.ALTERNATING
    assert trained(tokenizer, encode(tokenizer, TURNS)) == [" the quick\n\nfox é 🦊<|im_end|>", "  two  <|im_end|>"]


def test_everything_is_trained_when_asked(tokenizer):
    assert encode(tokenizer, TURNS, completion_only=False).mask_T.all()


@pytest.mark.parametrize("template", [templates.CHATML, templates.MARKED])
def test_only_the_completion_of_a_prompt_is_trained(template):
    tokenizer = wrap(byte_level(), template)
    conversation = Conversation(TURNS, prompt_messages=3)
    assert trained(tokenizer, encode(tokenizer, conversation)) == [" two  <|im_end|>"]


def test_token_that_begins_in_the_context_is_context():
    tokenizer = wrap(byte_level(), "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = ({"role": "user", "content": "the qu"}, {"role": "assistant", "content": "ick fox"})
    example = encode(tokenizer, messages)
    assert tokenizer.tokenize("the quick fox") == ["the", "Ġquick", "Ġfox"]
    assert trained(tokenizer, example) == [" fox"]


def test_bos_is_neither_doubled_nor_missed():
    tokenizer = wrap(byte_level(), templates.LLAMA3, adds_bos=True)
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, TURNS).ids_T.tolist().count(bos) == 1
    for text in ("hello", "<|bos|>hello"):
        ids = encode(tokenizer, Conversation(text=text)).ids_T.tolist()
        assert ids.count(bos) == 1
        assert ids[0] == bos
    assert bos not in encode(wrap(byte_level()), Conversation(text="hello")).ids_T


@pytest.mark.parametrize("text", ["hello world", "hello world<|im_end|>", ""])
def test_text_is_trained_whole_and_ends_once(tokenizer, text):
    example = encode(tokenizer, Conversation(text=text))
    assert example.mask_T.all()
    assert tokenizer.decode(example.ids_T) == text.removesuffix("<|im_end|>") + "<|im_end|>"


def test_plain_joining_without_a_template():
    tokenizer = wrap(byte_level(), None, adds_bos=True)
    example = encode(tokenizer, (SYSTEM, *TURNS[:2]), use_chat_template=False)
    joined = "<|bos|>be brief\nhello  world\nthe quick\n\nfox é 🦊<|im_end|>"
    assert tokenizer.decode(example.ids_T) == joined
    assert trained(tokenizer, example) == ["the quick\n\nfox é 🦊<|im_end|>"]
    everything = encode(tokenizer, TURNS[:2], use_chat_template=False, completion_only=False)
    assert everything.mask_T[1:].all()


def test_thinking_stripped_from_earlier_turns_is_refused_with_a_remedy(tokenizer):
    tokenizer.chat_template = templates.STRIPS_THINKING
    reply = {"role": "assistant", "content": "<think>hm</think>two"}
    assert trained(tokenizer, encode(tokenizer, (TURNS[0], reply))) == ["<think>hm</think>two<|im_end|>"]
    with pytest.raises(RowError) as error:
        encode(tokenizer, (TURNS[0], reply, TURNS[2], reply))
    for words in ("rewrites earlier turns", "message 2", "{% generation %}", "sft_train_on_completion_only=false"):
        assert words in str(error.value)
    assert encode(tokenizer, (TURNS[0], reply, TURNS[2], reply), completion_only=False).mask_T.all()


def test_empty_block_that_only_the_last_reply_has(tokenizer):
    tokenizer.chat_template = templates.EMPTY_THINKING_LAST
    first, last = trained(tokenizer, encode(tokenizer, TURNS))
    assert first == "the quick\n\nfox é 🦊<|im_end|>"
    assert last == "<think>\n\n</think>\n\n two  <|im_end|>"


def test_tools_and_tool_calls_reach_the_template(tokenizer):
    tokenizer.chat_template = templates.WITH_TOOLS
    conversation = Conversation(TOOL_TURNS, tools=({"name": "add"},))
    example = encode(tokenizer, conversation)
    assert '{"name": "add"}' in tokenizer.decode(example.ids_T).split("user")[0]
    assert trained(tokenizer, example) == ['<call>{"name": "add"}</call><|im_end|>', "four<|im_end|>"]
    assert gaps(tokenizer, conversation) == ()


def test_template_without_tools_gets_calls_as_text_and_a_warning(tokenizer):
    conversation = Conversation(TOOL_TURNS, tools=({"name": "add"},))
    assert trained(tokenizer, encode(tokenizer, conversation)) == ['{"name": "add"}<|im_end|>', "four<|im_end|>"]
    assert len(gaps(tokenizer, conversation)) == 2


@pytest.mark.parametrize("messages", [TURNS, TURNS[:2], TURNS[1:]])
def test_header_that_is_trained_is_warned_of(tokenizer, messages):
    conversation = Conversation(messages)
    (warning,) = gaps(tokenizer, conversation, template=templates.WITHOUT_PROMPT)
    assert "ignores add_generation_prompt" in warning
    assert trained(tokenizer, encode(tokenizer, messages, template=templates.WITHOUT_PROMPT))[0].startswith("<|im_sta")
    assert gaps(tokenizer, conversation, template=templates.WITHOUT_PROMPT, completion_only=False) == ()


@pytest.mark.parametrize(
    "template", [templates.CHATML, templates.MARKED, templates.LLAMA3, templates.EMPTY_THINKING_LAST]
)
def test_header_that_is_not_trained_is_not_warned_of(tokenizer, template):
    assert gaps(tokenizer, Conversation(TURNS), template=template) == ()


def test_template_may_need_no_generation_prompt(tokenizer):
    assert gaps(tokenizer, Conversation(TURNS), template=templates.ALTERNATING) == ()


@pytest.mark.parametrize(
    ("conversation", "silent"),
    [
        (Conversation(TURNS), False),
        (Conversation(({"role": "user", "content": ""}, TURNS[1])), False),
        (Conversation((*TURNS, {"role": "assistant", "content": " \n", "name": "a"})), True),
        (Conversation(({"role": "assistant", "content": ""}, *TURNS), prompt_messages=1), False),
        (Conversation(({"role": "assistant", "content": "", "reasoning_content": "hm"},)), False),
        (Conversation(TOOL_TURNS), False),
        (Conversation(text=" "), True),
        (Conversation(text="a"), False),
    ],
)
def test_empty_replies_are_noticed(conversation, silent):
    assert chat.is_silent(conversation) is silent


@pytest.mark.parametrize(
    ("template", "ends"), [(templates.CHATML, True), (templates.MARKED, True), (templates.MARKED_WITHOUT_END, False)]
)
def test_missing_end_token_is_noticed(tokenizer, template, ends):
    example = encode(tokenizer, TURNS, template=template)
    assert chat.trains_end(example, chat.end_tokens(tokenizer)) is ends


def test_failing_template_says_what_it_says(tokenizer):
    tokenizer.chat_template = templates.ALTERNATING
    with pytest.raises(RowError, match=r"roles: system, user.*roles must alternate user/assistant"):
        encode(tokenizer, (SYSTEM, *TURNS[:1]))


def test_marks_in_a_macro_are_exact(tokenizer):
    example = encode(tokenizer, TURNS, template=templates.MARKED_IN_MACRO)
    assert trained(tokenizer, example) == ["the quick\n\nfox é 🦊", " two  "]


def test_marks_that_cannot_be_followed_are_refused(tokenizer):
    with pytest.raises(RowError, match="cuts or measures text"):
        encode(tokenizer, TURNS[:2], template=templates.MARKED_AND_CUT)
    with pytest.raises(RowError, match="which are no characters"):
        encode(tokenizer, ({"role": "assistant", "content": "\ufdd0"},), template=templates.MARKED)


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(RowError, match="not valid Unicode"):
        encode(tokenizer, Conversation(text="a\ud83d"))


def test_tokenizer_without_a_template(keys):
    tokenizer = wrap(byte_level(), None)
    with pytest.raises(UserError) as error:
        encode(tokenizer, TURNS)
    for words in ("base model", "chat_template_path", "use_chat_template=false"):
        assert words in str(error.value)
    assert chat.rendering(keys(), tokenizer).template == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.jinja", templates.MARKED), ("t.json", json.dumps({"chat_template": templates.MARKED}))],
)
def test_template_from_a_file(tokenizer, keys, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert chat.rendering(keys(chat_template_path=str(tmp_path / name)), tokenizer).template == templates.MARKED


@pytest.mark.parametrize(
    ("values", "content", "expected"),
    [
        ({"chat_template_path": "nowhere.jinja"}, None, "nowhere.jinja: no such file"),
        ({"chat_template_path": "bad.json"}, "{}", "no JSON object with a text field `chat_template`"),
        ({"chat_template_path": "bad.json"}, "{", "no JSON object with a text field `chat_template`"),
        ({"chat_template_path": "bad.json"}, "{}".encode("utf-16"), "bad.json: cannot be read: 'utf-8' codec"),
        ({"chat_template": "{% for %}"}, None, "not valid Jinja"),
    ],
)
def test_bad_templates(tokenizer, keys, tmp_path, monkeypatch, values, content, expected):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        chat.rendering(keys(**values), tokenizer)
    assert expected in str(error.value)


def test_preview_marks_what_is_trained(tokenizer):
    plain = preview(tokenizer, encode(tokenizer, TURNS[:2])).plain
    assert (
        plain == "<|im_start|>user\nhello  world<|im_end|>\n<|im_start|>assistant\n⟦the quick\n\nfox é 🦊<|im_end|>⟧\n"
    )


def test_preview_shortens_long_stretches(tokenizer):
    plain = preview(tokenizer, encode(tokenizer, Conversation(text="fox " * 500)), limit=40).plain
    assert len(plain) < 100
    assert "characters" in plain

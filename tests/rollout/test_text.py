"""Prompts equal Transformers' renderings; streamed text equals what is decoded from all tokens at once."""

from __future__ import annotations

import time

import numpy as np
import pytest
import templates
from kinds import NAMES, tokenizer
from toy import byte_level, wrap

import tiny
from luthier.data.chat import Rendering
from luthier.data.schemas import RowError
from luthier.errors import UserError
from luthier.rollout import text
from luthier.rollout.engine import Completion

TEXTS = (
    "Hello  world.\n\n  indented",
    "你好世界 — 漢字",
    "👩‍👩‍👧 family 🇫🇷🏴‍☠️ 🦊",
    "naïve é é \u0928\u093f ད",
    " a �b",
)
TURNS = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hello  world 🦊"})


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(stream: text.TextStream, ids, random) -> list[str]:
    """Push the ids in chunks of random sizes, and close."""
    cuts = np.sort(random.integers(0, len(ids) + 1, random.integers(0, len(ids) + 1)))
    return [*(stream.push(chunk.tolist()) for chunk in np.split(np.array(ids, int), cuts)), stream.close()]


def completion(ids, stopped_by=None) -> Completion:
    tokens_T = np.array(ids, np.int32)
    logp_T = np.zeros(len(ids), np.float32)
    finish = "length" if stopped_by is None else "stop"
    return Completion(0, 0, tokens_T, logp_T, logp_T, np.zeros_like(tokens_T), finish, stopped_by)


@NAMES
def test_a_stream_of_random_tokens_is_what_is_decoded_at_once(name):
    words, random = tokenizer(name), np.random.default_rng(0)
    for _ in range(300):
        # Some ids lie beyond the tokenizer's, as the padded rows of an embedding do.
        ids = random.integers(0, len(words) + 3, random.integers(0, 40)).tolist()
        assert "".join(streamed(text.TextStream(words), ids, random)) == whole(words, ids)
        assert text.decode(words, completion(ids), ()) == whole(words, ids)


@NAMES
def test_a_stream_of_text_gives_whole_characters_as_they_come(name):
    words, random = tokenizer(name), np.random.default_rng(1)
    for original in TEXTS:
        ids = words(original, add_special_tokens=False)["input_ids"]
        for _ in range(20):
            pieces = streamed(text.TextStream(words), ids, random)
            assert "".join(pieces) == whole(words, ids)
        stream = text.TextStream(words)
        for token in ids:
            piece = stream.push([token])
            assert "\ufffd" not in piece or "\ufffd" in original


@pytest.mark.parametrize("name", ["byte-level", "bytes", "smollm2"])
def test_nothing_is_held_longer_than_a_character(name):
    words = tokenizer(name)
    stream, said = text.TextStream(words), ""
    ids = words("plain words 🦊 你好", add_special_tokens=False)["input_ids"]
    for count, token in enumerate(ids, start=1):
        said += stream.push([token])
        # A token may hold a space and the first bytes of what follows it.
        assert said.rstrip() == whole(words, ids[:count]).rstrip("\ufffd ")


@NAMES
def test_streams_stop_at_stop_texts_whatever_the_chunks(name):
    words, random = tokenizer(name), np.random.default_rng(2)
    for _ in range(100):
        original = "".join(random.choice(list("aab \n你"), random.integers(0, 30)))
        ids = words(original, add_special_tokens=False)["input_ids"]
        stop = ["".join(random.choice(list("ab \n你"), random.integers(1, 4))) for _ in range(2)]
        full = whole(words, ids)
        places = [place for each in stop if (place := full.find(each)) >= 0]
        expected = full[: min(places)] if places else full
        # The engine ends a completion with the token that completes a stop text: feed no more than that.
        used = next((n for n in range(len(ids) + 1) if any(each in whole(words, ids[:n]) for each in stop)), len(ids))
        pieces = streamed(text.TextStream(words, stop), ids[:used], random)
        assert "".join(pieces) == expected, (original, stop)
        assert text.decode(words, completion(ids[:used], stop[0] if places else None), stop) == expected


def test_what_may_begin_a_stop_text_is_held_until_it_is_known():
    words = tiny.tokenizer()
    stream = text.TextStream(words, ["\nUser:"])
    parts = [words(part, add_special_tokens=False)["input_ids"] for part in ("a\n", "U", "ser", "s\nUser", ":x")]
    assert list(map(stream.push, parts)) == ["a", "", "", "\nUsers", ""]
    assert stream.push([10]) == stream.close() == ""


def test_the_end_token_is_no_text_and_nothing_follows_it():
    words = tiny.tokenizer()
    ids = words("yes.no", add_special_tokens=False)["input_ids"]
    dot = ids[3]
    assert text.decode(words, completion(ids[:4], dot), ()) == "yes"
    stream = text.TextStream(words, stop_token_ids=[dot])
    assert [stream.push(ids), stream.push(ids), stream.close()] == ["yes", "", ""]
    assert text.decode(words, completion([*ids, words.eos_token_id], words.eos_token_id), ()) == "yes.no"


def test_half_a_character_at_the_very_end_is_shown_as_broken():
    words = tiny.tokenizer()
    ids = words("a🦊", add_special_tokens=False)["input_ids"][:-1]
    stream = text.TextStream(words)
    assert [stream.push(ids), stream.close()] == ["", "a\ufffd"]


def test_a_reply_drops_the_space_that_a_continuation_keeps():
    words = tokenizer("llama-like")
    before = text.encode_text(words, "the quick")
    ids = words("the quick brown", add_special_tokens=False)["input_ids"][len(before) :]
    assert text.decode(words, completion(ids), ()) == "brown"
    assert text.decode(words, completion(ids), (), after=before) == " brown"
    stream = text.TextStream(words, after=before)
    assert "".join(stream.push([token]) for token in ids) + stream.close() == " brown"


def test_the_work_is_linear_even_where_nothing_is_ever_certain():
    words = tiny.tokenizer()
    broken = words("é", add_special_tokens=False)["input_ids"][1]

    def seconds(count: int) -> float:
        started, stream = time.thread_time(), text.TextStream(words)
        for _ in range(count):
            stream.push([broken])
        assert stream.close() == "\ufffd" * count
        return time.thread_time() - started

    short = min(seconds(1000) for _ in range(3))
    assert seconds(8000) < 40 * short  # eight times where linear, sixty-four where quadratic


@NAMES
def test_prompts_equal_transformers_own(name):
    words = tokenizer(name)
    expected = words.apply_chat_template(list(TURNS), add_generation_prompt=True, return_dict=False)
    assert text.encode(words, Rendering(), TURNS) == expected
    assert text.encode_text(words, "hello world") == words("hello world")["input_ids"]


def test_tools_reach_the_template():
    words = wrap(byte_level(), templates.WITH_TOOLS)
    shown = words.decode(text.encode(words, Rendering(), TURNS[1:], [{"name": "add"}]))
    assert '{"name": "add"}' in shown


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_raw_prompt_is_the_text_itself(adds_bos):
    words = wrap(byte_level(), adds_bos=adds_bos)
    raw = Rendering(use_chat_template=False)
    bos = [words.bos_token_id] if adds_bos else []
    body = words("the quick", add_special_tokens=False)["input_ids"]
    assert text.encode(words, raw, [{"role": "user", "content": "the quick"}]) == bos + body
    assert text.encode_text(words, "the quick") == bos + body
    assert text.encode_text(words, words.bos_token + "the quick") == [words.bos_token_id, *body]
    joined = words.decode(text.encode(words, raw, [*TURNS, {"role": "assistant", "content": "hi"}])[len(bos) :])
    assert joined == f"be brief\nhello  world 🦊\nhi{words.eos_token}"


def test_a_template_that_is_not_there_or_refuses_says_so():
    with pytest.raises(UserError, match="use_chat_template=false"):
        text.encode(wrap(byte_level(), None), Rendering(), TURNS)
    with pytest.raises(RowError, match=r"roles: system, user\): roles must alternate.*chat_template_path"):
        text.encode(wrap(byte_level(), templates.ALTERNATING), Rendering(), TURNS)
    with pytest.raises(RowError, match="not valid Unicode"):
        text.encode(tiny.tokenizer(), Rendering(), [{"role": "user", "content": "\ud83e"}])

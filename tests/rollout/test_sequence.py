"""Stop texts are found at the token that completes them, whatever the chunks that tokens come in."""

from __future__ import annotations

import numpy as np
import pytest
from kinds import NAMES, tokenizer

from luthier.rollout.sequence import StopTexts

LETTERS = list("ab \n你日😀🦊")


def found(words, stop: tuple[str, ...], ids: list[int], size: int) -> tuple[int, str] | None:
    """Return what is found, counted from the first token, where tokens come ``size`` at a time."""
    watch = StopTexts(words, stop)
    for start in range(0, len(ids), size):
        if hit := watch.push(np.asarray(ids[start : start + size], np.int32)):
            return start + hit[0], hit[1]
    return None


@NAMES
def test_a_stop_text_is_found_at_the_token_that_completes_it(name: str) -> None:
    words, random = tokenizer(name), np.random.default_rng(3)
    for _ in range(40):
        ids = words("a" + "".join(random.choice(LETTERS, 20)), add_special_tokens=False)["input_ids"]
        stop = tuple("".join(random.choice(LETTERS, random.integers(1, 4))) for _ in range(2))
        texts = [words.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
        end = next((n for n, text in enumerate(texts) if any(each in text for each in stop)), None)
        hits = {found(words, stop, ids, size) for size in (1, 2, 3, 5, 16, 100)}
        assert len(hits) == 1, (ids, stop, hits)
        (hit,) = hits
        assert (hit and hit[0]) == end, (ids, stop)


def test_of_two_the_one_that_comes_first_in_the_text_is_named() -> None:
    words = tokenizer("smollm2")
    ids = words("one two three", add_special_tokens=False)["input_ids"]
    assert StopTexts(words, ("e two", "ne")).push(np.asarray(ids)) == (1, "ne")
    watch = StopTexts(words, ("two", " tw"))
    assert watch.push(np.asarray(ids)) == (2, " tw")


@pytest.mark.parametrize("size", [1, 4])
def test_tokens_beyond_the_tokenizer_s_are_no_text(size: int) -> None:
    words = tokenizer("smollm2")
    ids = [len(words) + 1, *words("so\n", add_special_tokens=False)["input_ids"], len(words) + 2]
    assert found(words, ("\n",), ids, size) == (len(ids) - 1, "\n")

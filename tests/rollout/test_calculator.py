"""The calculator: exact, bounded in time, and polite about everything that is not arithmetic."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest

import tiny
from luthier.data.chat import Rendering
from luthier.rollout.calculator import INSTRUCTIONS, Calculator, value
from luthier.rollout.environment import Edge
from luthier.rollout.prompts import Prompt

WORDS = tiny.tokenizer()
EDGE = Edge(WORDS, Rendering(), (WORDS.eos_token_id,))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("12*7", "84"),
        (" 48 / 2 ", "24"),
        ("(1 + 2) * -3", "-9"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333"),
        ("2/3*3", "2"),
        ("100*100", "10000"),
        ("7//2", "3"),
        ("7%4", "3"),
        ("2^10", "1024"),
        ("2**-2", "0.25"),
        ("$1,050 \u00d7 2", "2100"),
        ("6\u00f73\u22121", "1"),
        ("1/1000000000", "0.000000001"),
        ("12345678901.5+0", "12345678901.5"),
        ("(-1)**99999999999", "-1"),
        ("1**9999999999999", "1"),
        ("0**5", "0"),
        ("-0", "0"),
    ],
)
def test_values(expression, expected):
    assert value(expression) == expected


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "not arithmetic"),
        ("1+", "not arithmetic"),
        ("(" * 150, "not arithmetic"),
        ("1 2", "not arithmetic"),
        ("(1)(2)", "not arithmetic"),
        ("x", "not arithmetic"),
        ("__import__('os')", "not arithmetic"),
        ("1e5", "not arithmetic"),
        ("...", "not arithmetic"),
        ("007", "not arithmetic"),
        ("1/0", "division by zero"),
        ("1%0", "division by zero"),
        ("0**-1", "division by zero"),
        ("2**0.5", "not a whole exponent"),
        ("9**9**9", "too large"),
        ("2**1000", "too large"),
        ("9**99999999999999", "too large"),
        ("0.5**99999", "too large"),
        ("9" * 100, "too large"),
        ("1+" * 200 + "1", "too long"),
    ],
)
def test_what_has_no_value_is_said_shortly(expression, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        value(expression)


def test_random_expressions_are_right_or_refused_and_never_take_long():
    random = np.random.default_rng(0)
    known = 0
    for _ in range(3000):
        text = "".join(random.choice(list("0123456789.+-*/%() "), random.integers(1, 30)))
        started = time.thread_time()
        try:
            found = value(text)
        except ValueError:
            found = None
        assert time.thread_time() - started < 0.2, text
        if found is not None and "." not in text and "*" not in text and "/" not in text and "%" not in text:
            assert Fraction(found) == Fraction(eval(text))
            known += 1
    assert known > 20


def asked(*messages) -> Prompt:
    return Prompt("row 1", messages or ({"role": "user", "content": "12 times 7?"},), "12 times 7?")


def step(environment: Calculator, reply: str):
    return environment.step(np.array(WORDS(reply)["input_ids"], np.int32))


def test_it_answers_expressions_and_ends_with_anything_else():
    calculator = Calculator(EDGE, instructions="")
    assert calculator.reset(asked()) is None
    seen = step(calculator, "It is <calc>12*7</calc>")
    assert (WORDS.decode(seen.tokens), seen.reward, seen.done) == ("<result>84</result>", None, False)
    assert WORDS.decode(step(calculator, "<calc>1</calc> <calc>2+</calc>\n").tokens) == (
        "<result>error: not arithmetic</result>"
    )
    assert WORDS.decode(step(calculator, "<calc>2+2</calc><").tokens) == "result>4</result>"
    assert WORDS.decode(step(calculator, "2+2</calc>").tokens) == "<result>error: no expression</result>"
    for reply in ("84<|im_end|>", "<calc>12*7", "", "<|im_end|>"):
        assert step(calculator, f"{reply}x").done


def test_it_says_how_it_is_used_in_the_system_message():
    calculator = Calculator(EDGE)
    for prompt, expected in (
        (asked(), INSTRUCTIONS),
        (asked({"role": "system", "content": "Be brief."}, *asked().messages), f"Be brief.\n\n{INSTRUCTIONS}"),
    ):
        ids = calculator.reset(prompt)
        messages = [{"role": "system", "content": expected}, {"role": "user", "content": "12 times 7?"}]
        assert ids == WORDS.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

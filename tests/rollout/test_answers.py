"""The final answer of a text, under the marks that people and models put around one."""

from __future__ import annotations

import pytest

from luthier.rollout import answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("48/2 = <<48/2=24>>24 clips\n#### 1,234", "1234"),
        ("#### $5 of the 8", "5"),
        ("It costs $1,050.00.", "1050"),
        ("so 1,2 and 3", "3"),
        ("-5", "-5"),
        ("a loss of -$12.50", "-12.5"),
        ("10-5", "5"),
        ("(3)-4", "4"),
        ("\u22127", "-7"),
        ("about .5 litres", "0.5"),
        ("1{,}234 km", "1234"),
        (r"\$40\%", "40"),
        ("-0", "0"),
        ("007", "7"),
        ("100", "100"),
        ("no number", None),
        ("#### Step 3: total\nThe total is 72.", "72"),
        ("#### 2. Compute\nIt is 72.", "72"),
        ("#### 72 clips\n#### Check 5\nwell", "72"),
        ("#### **$72.00**\nas 3 > 2", "72"),
        ("#### Step 3 ####\nThat is 72.", "72"),
        ("3 apples\n#### none", "3"),
        ("123456789012345678901234567891", "123456789012345678901234567891"),
        ("0.1234567890123456789012345678910", "0.123456789012345678901234567891"),
        ("0.00", "0"),
        ("\u0663", "3"),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert answers.final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 72", "72"), ("#### total: 3\n4", "3"), ("3 apples\n#### none", None), ("1 or 2", "2")],
)
def test_final_number_of_a_reference(text, number):
    assert answers.final_number(text, reference=True) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"thus \boxed{\frac{1}{2}} and no more", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_boxed(text, answer):
    assert answers.boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> B </answer> and 7", "B"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        (r"#### 5 but \boxed{6}", "6"),
        ("reasons\n#### 5\nmore", "5"),
        ("The answer is **12 apples**.", "12 apples"),
        ("Answer: 3\nFinal answer: 4", "4"),
        ("Final Answer: The final answer is $7$. I hope it is correct.", "$7$"),
        ("Answer: The answer is: 7", "7"),
        ("The answer is 5, since the answer is odd", "5, since the answer is odd"),
        ("I have an answer in mind", None),
        ("nothing marked 5", None),
        ("Answer:\n42", "42"),
        ("**Answer:**\n\n42", "42"),
        ("The answer is:\n\n$$\n42\n$$", "42"),
        ("Answer:\n**Final answer: 4**", "4"),
        ("Answer:\n", None),
        ("#### Step 3: total\nThe total is 72.", None),
        ("#### **3. Total**\n\nThe total is 72.", None),
        ("#### 72\n#### Check\nfine", "72"),
        ("#### Final answer: 72\nfine", "72"),
        ("well\n#### Paris\n", "Paris"),
        ("#### Sum ####\nThe answer is 72\n####", "72"),
    ],
)
def test_stated(text, answer):
    assert answers.stated(text) == answer


def test_hashes_in_a_reference_are_always_a_mark():
    assert answers.stated("#### Paris\nin France", reference=True) == "Paris"


@pytest.mark.parametrize(
    "texts",
    [
        (
            "#### 1,000",
            "The answer is $1000.00",
            r"\boxed{1000}",
            "It is 1000 dollars",
            "Answer: 1000 dollars per month",
            "The answer is 1000, because it is 10 * 100",
            "The answer is $1000$ dollars.",
            "**Answer:**\n\n**1000**",
        ),
        ("<answer>Paris</answer>", "answer: paris.", "Let me think.\n\nPARIS", "paris\n ", "so\nParis\n \t\n\n"),
        (r"\boxed{\sqrt{2}}", r"Answer: \sqrt{2}"),
        (
            r"\boxed{\frac{1}{2}}",
            r"\boxed{\dfrac{1}{2}}",
            r"\boxed{ \frac12 }",
            r"\boxed{\tfrac 1 2}",
            r"\boxed{\frac1{2}}",
            r"\boxed{\frac{1}2}",
            r"The answer is $\frac{1}{2}$.",
            r"Answer: \(\frac{ 1 }{ 2 }\)",
            r"\boxed{\frac{1}{2}\text{ apples}}",
            r"\boxed{\frac{1}{2}\,\text{m}}",
            "The answer is 1/2.",
        ),
        (
            "Final Answer: The final answer is $7$. I hope it is correct.",
            "The answer is 7. I hope this is correct.",
            r"\boxed{7 \text{ apples}}",
            r"\boxed{7\text{cm}^2}",
            r"\boxed{7\,\mathrm{m}}",
            "Answer: $7$ apples",
        ),
        (r"\boxed{\text{Paris}}", r"\boxed{\textbf{Paris}}", "Paris"),
        (r"\boxed{\left(1, \dfrac{x+1}{2}\right)}", r"\boxed{(1, \frac{x+1}{2})}"),
    ],
)
def test_votes_for_the_same_answer_are_equal(texts):
    assert len({answers.final_answer(text) for text in texts}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Answer: 2x", "Answer: 2"),
        ("Answer: 2, 3", "Answer: 2"),
        (r"\boxed{\sqrt{2}}", r"\boxed{2}"),
        ("a", "b"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{2}{1}}"),
        (r"\boxed{\frac{1}{23}}", r"\boxed{\frac{12}{3}}"),
        (r"\boxed{x = \text{yes}}", r"\boxed{x = \text{no}}"),
        (r"\boxed{\frac{1}{x+1}}", r"\boxed{1/x+1}"),
        (r"\boxed{\leftarrow}", r"\boxed{\rightarrow}"),
        ("Answer: $1$ or $2$", "Answer: $1$ and $2$"),
        (r"\boxed{2^\frac{1}{2}}", r"\boxed{2}"),
        (r"\boxed{3\frac12}", r"\boxed{\frac{31}{2}}"),
        (r"\boxed{5\text{ and }6}", r"\boxed{5\text{ and }7}"),
        (r"\boxed{-\frac12}", r"\boxed{\frac12}"),
    ],
)
def test_votes_for_other_answers_are_not(one, other):
    assert answers.final_answer(one) != answers.final_answer(other)


def test_no_text_has_no_answer():
    assert answers.final_answer(" \n ") is None

"""Reward functions: the built-in ones, users' own, and what is said when one is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.data import files
from luthier.errors import UserError
from luthier.rollout import reward
from luthier.rollout.reward import Group
from tiny import needs_reasoning_gym

OWN = """
import asyncio

def named(completions, answer):
    return [float(len(text)) + len(column) for text, column in zip(completions, answer)]

def trl_style(prompts, completions, completion_ids, **kwargs):
    assert {"answer", "level", "reference"} <= set(kwargs), sorted(kwargs)
    return [float(completion[0]["content"] == kwargs["answer"][0]) for completion in completions]

async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [None, 2]

def numbers(completions, **kwargs):
    import numpy
    return numpy.array([1.5, True])

def none(completions, **kwargs): return None
def text(completions, **kwargs): return "12"
def few(completions, **kwargs): return [1.0]
def nan(completions, **kwargs): return [0.0, float("nan")]
def words(completions, **kwargs): return ["0.5", 1]
def raises(completions, **kwargs): return [1 / 0]
def needs(completions, solution): return [0.0, 0.0]
def typo(completions, answr): return [0.0, 0.0]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_rewards", raising=False)
    return tmp_path


def group(*completions, reference: str | None = "72", **row) -> Group:
    ids = [[1, 2]] * len(completions)
    return Group("How many?", completions, ids, {"prompt": "How many?", **row}, reference, "rows.jsonl, line 3")


def given(name: str, *completions, **row) -> list[float]:
    return reward.score(reward.load([name]), group(*completions, **row))[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "reference", "completions"),
    [
        ("exact_match", "72", {"72": 1, " 72\n": 1, "72.": 0, "": 0}),
        ("final_number", "= <<24+48=72>>72\n#### 72", {"#### 72": 1, "It is $72.00 now.": 1, "72, not 71": 0, "": 0}),
        ("math", "24+48 = <<24+48=72>>72\n#### 72", {"The answer is $72$.": 1, r"\boxed{144/2}": 1, "71": 0, "": 0}),
        ("math", r"\frac{1}{2}", {r"\boxed{0.5}": 1, "$1/2$": 1, r"$\frac{2}{1}$": 0}),
        ("math", r"\{1,2\}", {r"$\{2, 1\}$": 1, r"$\{1\}$": 0}),
        ("boxed", None, {r"\boxed{3}": 1, r"\boxed{}": 0, "3": 0}),
        ("answer_tags", None, {"<answer>3</answer>": 1, "<answer></answer>": 0, "<answer>1</answer><answer>": 0}),
    ],
)  # fmt: skip
def test_built_in(name, reference, completions):
    assert given(name, *completions, reference=reference) == list(completions.values())
    as_messages = [[{"role": "assistant", "content": text}] for text in completions]
    assert given(name, *as_messages, reference=reference) == list(completions.values())


@pytest.mark.parametrize(("name", "reference"), [("exact_match", None), ("final_number", "none"), ("math", None)])
def test_rows_without_a_reference_are_not_scored(name, reference):
    assert np.isnan(given(name, "72", reference=reference)).all()


@needs_reasoning_gym
def test_verifiers_of_reasoning_gym():
    row = files.open_splits("reasoning_gym:chain_sum,max_terms=3")["test"]()[0]
    right = row["answer"]
    assert given("reasoning_gym", right, f"So <answer>{right}</answer>", f"Answer: {right}", "x", **row) == [1, 1, 1, 0]
    with pytest.raises(UserError, match=r"line 3: reward function `reasoning_gym`: .*these rows have no `task`"):
        given("reasoning_gym", "1")


def test_rewards_are_a_matrix_in_the_order_named(own):
    functions = reward.load(["final_number", "own_rewards.py:named", "own_rewards.slow"])
    assert [each.name for each in functions] == ["final_number", "named", "slow"]
    rewards_GF = reward.score(functions, group("72", "no", answer="abc"))
    np.testing.assert_array_equal(rewards_GF, [[1, 5, np.nan], [0, 5, 2]])


def test_functions_of_the_same_name_are_told_apart(own):
    (own / "other.py").write_text("def named(completions, **_): return [0.0] * len(completions)\n")
    names = [each.name for each in reward.load(["own_rewards.py:named", "other.py:named"])]
    assert names == ["own_rewards.py:named", "other.py:named"]


def test_functions_written_for_trl_run(own):
    said = [{"role": "assistant", "content": "72"}], [{"role": "assistant", "content": "7"}]
    assert given("own_rewards.py:trl_style", *said, answer="72", level=3) == [1, 0]
    assert given("own_rewards.py:numbers", *said) == [1.5, 1.0]


def test_the_rows_own_answer_goes_before_a_column_named_reference():
    own = [Group("How many?", ["72"], [[1]], {"reference": "a book"}, answer, "line 3") for answer in ("72", None)]
    exact = reward.load(["exact_match"])
    assert [reward.score(exact, each).item() for each in own] == [1, 0]


def test_answers_of_gsm8k_are_read(data_folder):
    rows = [json.loads(line) for line in (data_folder / "gsm8k_test.jsonl").read_text().splitlines()]
    for row in rows:
        answer = row["answer"].rpartition("#### ")[2]
        assert given("final_number", row["answer"], f"It is ${answer}.", "no", reference=row["answer"]) == [1, 1, 0], (
            row
        )
    for row in rows[:40]:
        answer = row["answer"].rpartition("#### ")[2]
        assert given("math", rf"\boxed{{{answer}}}", rf"\boxed{{{answer}1}}", reference=row["answer"]) == [1, 0], row


@pytest.mark.slow
def test_trls_own_functions_run():
    pytest.importorskip("trl", reason="TRL is not installed: make test-slow")
    said = [{"role": "assistant", "content": r"\boxed{72}"}], [{"role": "assistant", "content": r"\boxed{7}"}]
    assert given("trl.rewards.accuracy_reward", *said, solution="$72$") == [1, 0]
    thought = [{"role": "assistant", "content": "<think>\nhm\n</think>\n72"}], said[0]
    assert given("trl.rewards.think_format_reward", *thought) == [1, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_macth", "reward_functions=exact_macth: no built-in reward function. Did you mean `exact_match`?"),
        ("xyz", "There are exact_match, final_number, math"),
        (
            "own_rewards.py:naned",
            "reward_functions=own_rewards.py:naned: no function `naned` there. Did you mean `named`?",
        ),
        ("nowhere.f", "No module named 'nowhere'"),
        ("own_rewards.py:none", "line 3: reward function `none` returned NoneType; it should return a list of 2"),
        ("own_rewards.py:text", "returned str; it should return a list of 2"),
        ("own_rewards.py:few", "returned 1 rewards; it should return a list of 2"),
        ("own_rewards.py:nan", "`nan` returned nan for completion 2, which is not finite"),
        ("own_rewards.py:words", "`words` returned '0.5' for completion 1, which is no number"),
        ("own_rewards.py:raises", "line 3: reward function `raises` failed: ZeroDivisionError: division by zero. ("),
        ("own_rewards.py:needs", "needs `solution`, which is no column of the row. There are reference, answer"),
        ("own_rewards.py:typo", "Did you mean `answer`?"),
    ],
)
def test_wrong_functions(own, name, message):
    with pytest.raises(UserError) as error:
        given(name, "72", "7", answer="72")
    assert message in str(error.value)


def test_a_function_named_twice():
    with pytest.raises(UserError, match="math stands twice"):
        reward.load(["math", "math"])

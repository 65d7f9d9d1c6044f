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
def shout(completions, answer, times=1, *, word): return [float(text.count(word) >= times) for text in completions]
def takes_all(completions, **kwargs): return [kwargs["level"] + kwargs["bonus"]] * len(completions)
def quits(completions): raise SystemExit("enough")
def late(completions): yield 1.0; raise OSError("gone")
def things(completions): return [print, 1.0]
def tuples(completions): return [__import__("numpy").ones(2), 1.0]
def excuse(completions): return [0.5, TimeoutError("no reply")]
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


def given(name: str, *completions, settings: dict | None = None, **row) -> list[float]:
    """Return what a function gives, and raise UserError where it fails."""
    [loaded] = reward.load([name], {name: settings} if settings else None)
    rewards, failure = reward.score(loaded, group(*completions, **row))
    if failure is not None:
        raise UserError(str(failure))
    return rewards


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
    with pytest.raises(UserError, match=r"line 3: reward function `reasoning_gym` needs `task`, which is no column"):
        given("reasoning_gym", "1")


def test_rewards_come_in_the_order_of_completions(own):
    functions = reward.load(["final_number", "own_rewards.py:named", "own_rewards.slow"])
    assert [each.name for each in functions] == ["final_number", "named", "slow"]
    found = [reward.score(function, group("72", "no", answer="abc")) for function in functions]
    np.testing.assert_array_equal([rewards for rewards, _ in found], [[1, 0], [5, 5], [np.nan, 2]])
    assert [failure for _, failure in found] == [None, None, None]


@pytest.mark.parametrize(
    ("name", "settings", "completions"),
    [
        ("regex_match", {"pattern": r"\d+"}, {"a 7": 1, "": 0, "no": 0}),
        ("regex_match", {"pattern": r"\d+", "full": True}, {" 77\n": 1, "a 7": 0}),
        ("regex_match", {"pattern": r"(?i)answer: {reference}$"}, {"Answer: 7.5": 1, "answer: 7x5": 0, "7.5": 0}),
        ("close_number", {}, {"7.5": 1, "7.56": 1, "7.43": 1, "7.58": 0, "-7.5": 0, "none": 0}),
        ("close_number", {"relative": 0, "absolute": 1}, {"8.5": 1, "8.51": 0}),
        ("length", {"maximum": 2}, {"any": 1}),
        ("length", {"minimum": 3}, {"any": 0}),
        ("length", {"minimum": 2, "maximum": 3, "slack": 1, "unit": "words"}, {"a": 0.5, "a  b": 1, "a b c d": 0.5}),
        ("length", {"minimum": 2, "unit": "words"}, {"": 0, "one": 0, "one two": 1}),
        ("length", {"minimum": 4, "maximum": 4, "slack": 3, "unit": "characters"}, {"four": 1, "1": 0.25, "six": 0.75}),
    ],
)  # fmt: skip
def test_built_in_with_settings(name, settings, completions):
    assert given(name, *completions, settings=settings, reference="7.5") == list(completions.values())


def test_a_pattern_with_a_reference_needs_one():
    assert given("regex_match", "7", settings={"pattern": "7"}, reference=None) == [1]
    assert np.isnan(given("regex_match", "7", settings={"pattern": "{reference}"}, reference=None)).all()


def test_settings_go_to_the_function_they_name(own):
    settings = {"shout": {"word": "hey"}, "own_rewards.py:takes_all": {"bonus": 0.5, "level": 1}}
    functions = reward.load(["own_rewards.py:shout", "own_rewards.py:takes_all"], settings)
    said = group("hey hey", "hi", answer="", level=7)
    assert [reward.score(function, said)[0] for function in functions] == [[1, 0], [1.5, 1.5]]
    assert [reward.needs(function) for function in functions] == [("completions", "answer"), ("completions",)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("regex_match", {}, "needs a setting `pattern`: reward_kwargs={'regex_match': {'pattern': ...}}"),
        ("regex_match", {"pattern": "("}, "is not a regular expression: missing )"),
        ("regex_match", {"pattern": 3}, "pattern=3 is not a text"),
        ("regex_match", {"patern": "a"}, "has no setting `patern`. Did you mean `pattern`?"),
        ("close_number", {"relative": -1}, "none may be below 0"),
        ("close_number", {"relative": "much"}, "reward_kwargs: `close_number`: "),
        ("length", {}, "it has no limit. Set `maximum`, `minimum` or both."),
        ("length", {"maximum": 3, "unit": "token"}, "unit='token': there are tokens, words, characters."),
        ("length", {"minimum": 4, "maximum": 3}, "0 <= minimum <= maximum"),
        ("math", {"seconds": 3}, "`math` has no setting `seconds`. There are none."),
        ("own_rewards.py:shout", {"completions": 3}, "`shout` has no setting `completions`"),
        ("own_rewards.py:shout", {"words": "hey"}, "`shout` has no setting `words`. Did you mean `word`?"),
    ],
)
def test_wrong_settings(own, name, settings, message):
    with pytest.raises(UserError) as error:
        reward.load([name], {name: settings})
    assert message in str(error.value)


def test_settings_of_a_function_that_is_not_there():
    with pytest.raises(
        UserError, match=r"reward_kwargs: lenght is none of the reward_functions\. Did you mean `length`"
    ):
        reward.load(["length"], {"lenght": {"maximum": 3}})


def test_columns_are_checked_before_anything_is_called(own):
    functions = reward.load(["own_rewards.py:needs", "own_rewards.py:shout", "exact_match"], {"shout": {"word": "hey"}})
    needed = {each.name: reward.needs(each) for each in functions}
    reward.check_columns(needed, ["solution", "answer"], "rows.jsonl")
    with pytest.raises(UserError, match=r"^rows.jsonl: reward function `needs` needs `solution`, which is no column"):
        reward.check_columns(needed, ["answer"], "rows.jsonl")
    with pytest.raises(UserError, match="`shout` needs `answer`"):
        reward.check_columns(needed, ["solution"], "rows.jsonl")


@pytest.mark.parametrize(("name", "rewards"), [("nan", [0, np.nan]), ("words", [np.nan, 1]), ("excuse", [0.5, np.nan])])
def test_a_bad_reward_costs_only_itself(own, name, rewards):
    [function] = reward.load([f"own_rewards.py:{name}"])
    found, failure = reward.score(function, group("a", "b"))
    np.testing.assert_array_equal(found, rewards)
    assert (failure.function, failure.place, failure.lost) == (name, "rows.jsonl, line 3", 1)


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
    [exact] = reward.load(["exact_match"])
    assert [reward.score(exact, each)[0] for each in own] == [[1], [0]]


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
        ("xyz", "There are exact_match, regex_match, final_number, close_number, math"),
        (
            "own_rewards.py:naned",
            "reward_functions=own_rewards.py:naned: no function `naned` there. Did you mean `named`?",
        ),
        ("nowhere.f", "No module named 'nowhere'"),
        ("own_rewards.py:none", "line 3: reward function `none` returned NoneType; it should return a list of 2"),
        ("own_rewards.py:text", "returned str; it should return a list of 2"),
        ("own_rewards.py:few", "returned 1 rewards; it should return a list of 2"),
        (
            "own_rewards.py:nan",
            "`nan` returned nan, which is not finite. Return a finite number, or None for no opinion. (completion 2)",
        ),
        (
            "own_rewards.py:words",
            "`words` returned '0.5', which is no number. Return a float, or None for no opinion. (completion 1)",
        ),
        ("own_rewards.py:raises", "line 3: reward function `raises` failed: ZeroDivisionError: division by zero. ("),
        ("own_rewards.py:quits", "`quits` failed: SystemExit: enough. ("),
        ("own_rewards.py:late", "`late` failed: OSError: gone. ("),
        ("own_rewards.py:things", "`things` returned <built-in function print>, which is no number. Return a float"),
        ("own_rewards.py:tuples", "returned ndarray, which is no number: TypeError"),
        ("own_rewards.py:excuse", "`excuse` failed: TimeoutError: no reply. (completion 2)"),
        (
            "own_rewards.py:needs",
            "needs `solution`, which is no column of the row and not set by reward_kwargs. There are reference, answer",
        ),
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

"""``reasoning_gym:TASK`` as a dataset."""

from __future__ import annotations

import pickle

import pytest

from luthier.data import files, reasoning, source
from luthier.errors import UserError
from tiny import needs_reasoning_gym

pytestmark = needs_reasoning_gym

TASK = "reasoning_gym:chain_sum,min_terms=3,max_terms=4,max_digits=1"


def opened(path: str = TASK, split: str = "train"):
    return files.open_split(files.open_splits(path), split, path, "split")


def test_problems_are_rows_with_question_and_answer():
    rows = opened()
    row = rows[5]
    assert set(row) == set(rows.columns) == {"question", "answer", "metadata", "task"}
    assert len(row["metadata"]["expression"].split()) in (5, 7)
    assert rows.place(5) == f"{TASK} (train), problem 6"
    assert len(rows) == 10_000
    assert pickle.loads(pickle.dumps(rows))[5] == opened()[5] == row


def test_splits_and_seeds_give_other_problems():
    large = "reasoning_gym:chain_sum,min_digits=8,max_digits=9"
    train, test, other = (
        {rows[index]["question"] for index in range(20)}
        for rows in (opened(large), opened(large, "test"), opened(f"{large},seed=1"))
    )
    assert len(train) == len(test) == len(other) == 20
    assert not train & test
    assert not train & other
    assert opened().fingerprint != opened(split="test").fingerprint
    assert len(opened(f"{TASK},size=12")) == 12
    assert len(opened(split="test[:10]")) == 10


def test_the_verifier_follows_the_tasks_settings():
    row = opened("reasoning_gym:countdown,operators=['+', '-']", "test")[0]
    assert reasoning.score(row["task"], row["metadata"]["expression"], row) == 1.0
    assert reasoning.score(row["task"], "1 + 1", row) < 0.5


def test_problems_without_an_answer_of_their_own_are_rows_too():
    row = opened("reasoning_gym:propositional_logic")[0]
    assert row["answer"] == ""


def test_training_reads_them(keys, tokenizer):
    config = keys(hf_path=f"{TASK},size=20", max_target_length=256, use_chat_template=False)
    train, _ = source.load(config, tokenizer)
    assert train.report.schema == "question"
    assert train.report.conversations == 20


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chain_su", "no task `chain_su`. Did you mean `chain_sum`?"),
        ("xyzzy", "There are ab, acre"),
        ("chain_sum,min_term=3", "`chain_sum` has no setting `min_term`. Did you mean `min_terms`?"),
        ("chain_sum,min_terms=0", "reasoning-gym refuses it: AssertionError: min_terms must be positive"),
        ("chain_sum,min_terms=[", "is not a list of name=value"),
    ],
)
def test_wrong_tasks(task, message):
    with pytest.raises(UserError) as error:
        files.open_splits(f"reasoning_gym:{task}")
    assert message in str(error.value)
    assert str(error.value).startswith("hf_path=reasoning_gym:")

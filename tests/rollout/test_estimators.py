"""pass@k and maj@k against all subsets, and the bootstrap against what is known of a mean."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from luthier.rollout import estimators


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(k):
    passed_PG = np.array([[0] * 6, [1] + [0] * 5, [0, 1, 0, 1, 0, 0], [1] * 6])
    subsets = list(itertools.combinations(range(6), k))
    expected = [np.mean([row[list(subset)].any() for subset in subsets]) for row in passed_PG]
    np.testing.assert_allclose(estimators.pass_at_k(passed_PG, k), expected, atol=1e-12)


def test_pass_at_1_is_the_mean():
    passed_PG = np.random.default_rng(0).random((20, 7)) < 0.3
    np.testing.assert_allclose(estimators.pass_at_k(passed_PG, 1), passed_PG.mean(axis=1), atol=1e-12)


def test_pass_at_k_of_many_samples_is_finite():
    passed_PG = np.zeros((1, 2000), bool)
    passed_PG[0, :3] = True
    (value,) = estimators.pass_at_k(passed_PG, 1000)
    assert value == pytest.approx(1 - 0.5**3, abs=1e-3)


def majority(answers, passed) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return float(np.mean([passed[answers.index(answer)] for answer in tied]))


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ("aab", "a", 1.0),
        ("abb", "a", 0.0),
        ("ab?", "a", 0.5),
        ("???", "a", 0.0),
        ("a??", "a", 1.0),
    ],
)
def test_majority_of_all_samples(answers, right, expected):
    said = [None if each == "?" else each for each in answers]
    passed_PG = np.array([[each == right for each in said]])
    assert estimators.majority_at_k([said], passed_PG, 3).tolist() == [expected]
    assert majority(said, passed_PG[0]) == expected


def test_majority_at_k_is_fair():
    """Over many prompts alike, runs of k samples give what all subsets of k do."""
    random = np.random.default_rng(1)
    drawn_PG = random.choice(["a", "b", "c"], p=[0.5, 0.3, 0.2], size=(4000, 6))
    all_three = [
        majority(list(said), np.array(said) == "a") * np.prod([{"a": 0.5, "b": 0.3, "c": 0.2}[each] for each in said])
        for said in itertools.product("abc", repeat=3)
    ]
    estimate = estimators.majority_at_k(drawn_PG.tolist(), drawn_PG == "a", 3).mean()
    assert estimate == pytest.approx(sum(all_three), abs=0.02)


@pytest.mark.parametrize("k", [0, 4])
def test_more_than_there_are(k):
    passed_PG = np.ones((1, 3))
    with pytest.raises(ValueError, match=f"@{k} of 3 samples"):
        estimators.pass_at_k(passed_PG, k)
    with pytest.raises(ValueError, match=f"@{k} of 3 samples"):
        estimators.majority_at_k([["a"] * 3], passed_PG, k)


def test_interval_is_that_of_a_mean_and_follows_the_seed():
    values_P = np.random.default_rng(2).normal(3.0, 2.0, 400)
    found = estimators.interval(values_P, seed=0)
    error = 1.96 * values_P.std() / 20
    assert found.value == values_P.mean()
    assert found.low == pytest.approx(values_P.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values_P.mean() + error, abs=0.1 * error)
    assert found == estimators.interval(values_P, seed=0) != estimators.interval(values_P, seed=1)


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(60):
        found = estimators.interval((random.random(60) < 0.4).astype(float), seed=trial)
        covered += found.low <= 0.4 <= found.high
    assert 52 <= covered <= 60

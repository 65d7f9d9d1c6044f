"""What an evaluation says, against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.rollout import evaluation


def test_summary_of_two_functions():
    right_PG = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1.0]])
    other_PG = np.array([[0.5, 0, 0, 1], [math.nan, 0, 0, 0], [2, 1, 0, 1]])
    texts = [["#### 3", "#### 4", "#### 3", "#### 3"], ["a", "b", "c", "d"], ["#### 1"] * 4]
    found = evaluation.summarise(np.stack([right_PG, other_PG], axis=2), texts, ["right", "other"], seed=3)
    right, other = found["right"], found["other"]
    assert set(right) == {"mean", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4", "unscored_prompts"}
    assert right["mean"]["value"] == pytest.approx(6 / 12)
    assert right["pass@1"]["value"] == pytest.approx(6 / 12)
    assert right["pass@2"]["value"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert right["pass@4"]["value"] == pytest.approx(2 / 3)
    # The most frequent answer, 3, is right for two of the three that gave it.
    assert right["maj@4"]["value"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert right["mean"]["low"] <= right["mean"]["value"] <= right["mean"]["high"]
    assert (right["unscored_prompts"], other["unscored_prompts"]) == (0, 1)
    assert other["mean"]["value"] == pytest.approx((1.5 + 4) / 8)
    again = evaluation.summarise(np.stack([right_PG, other_PG], axis=2), texts, ["right", "other"], seed=3)
    assert again == found


def test_the_ks_and_the_threshold_are_as_asked():
    rewards_PGF = np.array([[[0.5], [0.2]], [[0.6], [0.7]]])
    found = evaluation.summarise(rewards_PGF, [["a", "b"]] * 2, ["f"], every_k=[2], threshold=0.5)["f"]
    assert set(found) == {"mean", "pass@2", "maj@2", "unscored_prompts"}
    assert found["pass@2"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_function_without_any_reward_has_no_numbers():
    found = evaluation.summarise(np.full((2, 3, 1), math.nan), [["a"] * 3] * 2, ["f"])
    assert found == {"f": {"unscored_prompts": 2}}


def test_lengths():
    found = evaluation.lengths([(3, "stop"), (5, "length"), (1, "stop"), (7, "failed")])
    assert found == {
        "mean_length": 4.0,
        "min_length": 1,
        "max_length": 7,
        "clipped_ratio": 0.25,
        "finish_reason": {"stop": 2, "length": 1, "failed": 1},
    }

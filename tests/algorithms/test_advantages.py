"""Advantages by values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.algorithms.advantages import KINDS, advantages, overlong_penalty, total, zero_variance

NAN = np.nan
REWARDS_PG = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, NAN, -1.0, 0.5], [NAN, 3.0, NAN, NAN]])
THIRD = np.sqrt(1 / 3)  # deviation of (1, 0, 0, 1), divided by n - 1
HAND = {
    "group-std": [
        [0.5 / (THIRD + 1e-4), -0.5 / (THIRD + 1e-4), -0.5 / (THIRD + 1e-4), 0.5 / (THIRD + 1e-4)],
        [0, 0, 0, 0],
        [1.5 / (1.5 + 1e-4), 0, -1.5 / (1.5 + 1e-4), 0],
        [0, 0, 0, 0],
    ],
    "group-mean": [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [1.5, 0, -1.5, 0], [0, 0, 0, 0]],
    # 1 - (0 + 0 + 1) / 3 and 0 - (1 + 0 + 1) / 3; of three, 2 - (-1 + 0.5) / 2 and -1 - (2 + 0.5) / 2
    "leave-one-out": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0], [2.25, 0, -2.25, 0], [0, 0, 0, 0]],
}


@pytest.mark.parametrize("kind", HAND)
def test_by_hand(kind):
    found_PG = advantages(REWARDS_PG, kind)
    assert found_PG.dtype == np.float64
    np.testing.assert_allclose(found_PG, HAND[kind], atol=1e-12)


def test_over_the_batch_by_hand():
    """Twelve rewards that sum to 6.5, their squares to 1 + 1 + 4 + 1 + 0.25 + 9."""
    mean = 6.5 / 12
    np.testing.assert_allclose(advantages(REWARDS_PG, "batch-mean"), np.nan_to_num(REWARDS_PG - mean), atol=1e-12)
    std = np.sqrt((16.25 - 12 * mean**2) / 11)
    np.testing.assert_allclose(
        advantages(REWARDS_PG, "batch-std"), np.array(HAND["group-mean"]) / (std + 1e-4), atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_reward_gives_no_advantage_and_changes_no_other(kind):
    full_PG = np.array([[3.0, 1.0, 4.0], [1.0, 5.0, 9.0]])
    with_gaps_PG = np.array([[3.0, NAN, 1.0, 4.0], [1.0, 5.0, 9.0, NAN]])
    found_PG = advantages(with_gaps_PG, kind)
    np.testing.assert_allclose(found_PG[~np.isnan(with_gaps_PG)].reshape(2, 3), advantages(full_PG, kind), rtol=1e-12)
    np.testing.assert_array_equal(found_PG[np.isnan(with_gaps_PG)], 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards_PG", [np.full((2, 3), NAN), np.array([[1.0]]), np.array([[NAN, 1.0]])])
def test_nothing_to_compare_with_gives_zero(kind, rewards_PG):
    np.testing.assert_array_equal(advantages(rewards_PG, kind), 0)


def test_groups_without_variance():
    near_PG = np.array([[0.1 + 0.2, 0.3, 0.3, NAN], [0.3, 0.3, 0.3, 0.3001]])
    np.testing.assert_array_equal(zero_variance(REWARDS_PG), [False, True, False, True])
    np.testing.assert_array_equal(zero_variance(near_PG), [True, False])
    np.testing.assert_array_equal(zero_variance(np.full((1, 3), NAN)), [True])


def test_total_is_weighted_and_none_where_all_are():
    rewards_GF = np.array([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN], [0.0, 0.0]])
    np.testing.assert_array_equal(total(rewards_GF, np.array([1.0, 0.5])), [2.0, 1.0, 1.0, NAN, 0.0])


def test_overlong_penalty_is_a_line_over_the_buffer():
    lengths = np.array([1, 80, 81, 90, 99, 100, 120])
    np.testing.assert_allclose(overlong_penalty(lengths, 100, 20), [0, 0, -0.05, -0.5, -0.95, -1, -1])


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(ValueError, match=f"buffer {buffer}"):
        overlong_penalty(np.array([1]), 100, buffer)

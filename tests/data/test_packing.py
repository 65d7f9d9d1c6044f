from itertools import pairwise

import numpy as np
import pytest

from luthier.data import packing
from luthier.types import Example


def random_lengths(seed: int, row_length: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(1, row_length + 1, int(random.integers(1, 200)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("row_length", [2, 7, 64, 1000])
def test_rows_hold_every_conversation_once_and_none_overflows(seed, row_length):
    lengths_C = random_lengths(seed, row_length)
    row_C = packing.best_fit(lengths_C, row_length)
    members_C, starts_R1 = packing.members(row_C)
    assert sorted(members_C.tolist()) == list(range(len(lengths_C)))
    rows = [members_C[a:b] for a, b in pairwise(starts_R1)]
    assert all(0 < lengths_C[row].sum() <= row_length for row in rows)
    assert all((row_C[row] == number).all() for number, row in enumerate(rows))


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_takes_the_tightest_row(seed):
    lengths_C = random_lengths(seed, 50)
    row_C = packing.best_fit(lengths_C, 50)
    free: list[int] = []
    for length, row in zip(lengths_C.tolist(), row_C.tolist(), strict=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            assert free[row] == min(fitting)
        else:
            assert row == len(free)
            free.append(50)
        free[row] -= length


def test_shuffled_order_packs_well():
    lengths_C = np.random.default_rng(0).lognormal(5, 0.6, 5000).astype(int).clip(1, 1024)
    rows = packing.best_fit(lengths_C, 1024).max() + 1
    assert lengths_C.sum() / (rows * 1024) > 0.95


@pytest.mark.parametrize("lengths", [[0], [5, 11]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 10"):
        packing.best_fit(np.array(lengths), 10)


def test_no_conversations():
    members_C, starts_R1 = packing.members(packing.best_fit(np.array([], np.int64), 8))
    assert (len(members_C), starts_R1.tolist()) == (0, [0])


def test_collate_lays_segments_side_by_side():
    first = Example(np.array([5, 6, 7], np.int32), np.array([True, False, True]))
    second = Example(np.array([8, 9], np.int32), np.array([True, True]))
    batch = packing.collate([[first, second], [], [second]], 6, pad_id=1)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 1], [1] * 6, [8, 9, 1, 1, 1, 1]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert batch.mask_BT.astype(int).tolist() == [[0, 0, 1, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert batch.tokens_BT.dtype == batch.segments_BT.dtype == batch.positions_BT.dtype == np.int32


def test_collate_refuses_a_row_that_overflows():
    with pytest.raises(ValueError, match="row 0"):
        packing.collate([[Example(np.arange(4, dtype=np.int32), np.ones(4, bool))] * 2], 7)

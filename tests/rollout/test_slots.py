from __future__ import annotations

import numpy as np

from luthier.rollout.slots import Placement, Slots


def ids(*spans: range) -> np.ndarray:
    return np.asarray([i for span in spans for i in span], np.int32)


def test_samples_of_a_prompt_copy_its_row() -> None:
    slots: Slots[str] = Slots.empty(3, 64, 64)
    assert slots.place("a", ids(range(30))) == Placement(0, 0, 0)
    assert slots.place("b", ids(range(30))) == Placement(1, 0, 30)
    assert slots.place("c", ids(range(20), range(50, 60))) == Placement(2, 0, 20)
    assert slots.busy == [0, 1, 2]
    assert slots.free == []


def test_a_free_row_that_holds_the_beginning_goes_on_by_itself() -> None:
    slots: Slots[str] = Slots.empty(2, 64, 64)
    slots.place("x", ids(range(5)))
    slots.place("a", ids(range(10, 20)))
    slots.append(1, ids(range(20, 25)))
    slots.sequences[1] = None
    assert slots.place("a again", ids(range(10, 30))) == Placement(1, 1, 15)


def test_a_short_beginning_is_not_worth_a_copy_but_a_whole_short_prompt_is() -> None:
    slots: Slots[str] = Slots.empty(4, 64, 64)
    slots.place("a", ids(range(30)))
    assert slots.place("b", ids(range(8), range(40, 60))) == Placement(1, 1, 0)
    assert slots.place("c", ids(range(30, 34))) == Placement(2, 2, 0)
    assert slots.place("d", ids(range(30, 34))) == Placement(3, 2, 4)


def test_a_row_that_is_still_to_be_read_is_waited_for_where_that_saves_much() -> None:
    slots: Slots[str] = Slots.empty(5, 64, 64)
    slots.place("a", ids(range(50)))
    slots.place("b", ids(range(25), range(60, 70)))
    assert slots.place("c", ids(range(27), range(70, 80)), unread=[0]) == Placement(2, 1, 25)
    assert slots.place("d", ids(range(45), range(80, 90)), unread=[0]) == Placement(3, 0, 45)
    assert slots.place("e", ids(range(27), range(70, 80)), unread=[0, 2]) == Placement(4, 2, 37)


def test_a_ring_that_went_round_is_only_gone_on_from_where_it_ended() -> None:
    slots: Slots[str] = Slots.empty(3, 64, ring=16)
    slots.place("a", ids(range(40)))
    assert slots.place("b", ids(range(30))) == Placement(1, 1, 0)
    assert slots.place("c", ids(range(40), range(50, 55))) == Placement(2, 0, 40)


def test_the_keeper_has_a_prompt_that_a_ring_has_lost() -> None:
    slots: Slots[str] = Slots.empty(2, 64, ring=16, keepers=1)
    slots.place("a", ids(range(30)), 1)
    assert slots.free == [1]
    assert slots.keep(ids(range(30, 50)), 40, 1) is None  # no row has it
    assert slots.keep(ids(range(30)), 40) is None
    assert slots.keep(ids(range(30)), 40, 1) == (0, 2)
    assert slots.keep(ids(range(30)), 40, 1) is None  # it has that already
    slots.append(0, ids(range(50, 55)))
    assert slots.place("b", ids(range(30)), 1) == Placement(1, 2, 30)
    assert slots.free == []
    slots.sequences[1] = None
    slots.forget()
    assert slots.keep(ids(range(30)), 40, 1) is None
    assert slots.place("c", ids(range(30)), 1) == Placement(1, 1, 0)


def test_no_prompt_is_kept_without_a_keeper() -> None:
    slots: Slots[str] = Slots.empty(2, 64, 16)
    slots.place("a", ids(range(30)))
    assert slots.keep(ids(range(30)), 40) is None


def test_no_prompt_is_kept_that_a_ring_does_not_lose_or_is_soon_read() -> None:
    slots: Slots[str] = Slots.empty(2, 64, ring=32, keepers=1)
    slots.place("a", ids(range(30)))
    slots.place("b", ids(range(15)))
    assert slots.keep(ids(range(30)), 32) is None
    assert slots.keep(ids(range(15)), 40) is None
    assert slots.keep(ids(range(30)), 33) == (0, 2)


def test_what_another_adapter_has_read_is_not_gone_on_from() -> None:
    slots: Slots[str] = Slots.empty(4, 64, 64)
    slots.place("a", ids(range(30)), 1)
    assert slots.place("b", ids(range(30))) == Placement(1, 1, 0)
    assert slots.place("c", ids(range(30)), 1) == Placement(2, 0, 30)
    slots.sequences[2] = None
    slots.move(0, 2)
    assert slots.place("d", ids(range(30)), 2) == Placement(0, 0, 0)
    assert slots.place("e", ids(range(30)), 1) == Placement(3, 2, 30)


def test_new_weights_make_rows_worthless_and_leave_sequences_alone() -> None:
    slots: Slots[str] = Slots.empty(3, 64, 64)
    slots.place("a", ids(range(30)))
    slots.place("b", ids(range(40, 60)))
    slots.sequences[1] = None
    slots.forget()
    slots.append(0, ids(range(30, 32)))
    assert slots.busy == [0]
    assert slots.place("c", ids(range(32))) == Placement(1, 1, 0)
    assert slots.place("d", ids(range(40, 60))) == Placement(2, 2, 0)


def test_a_moved_sequence_takes_its_record_along() -> None:
    slots: Slots[str] = Slots.empty(3, 64, 64)
    for name, tokens in (("a", range(3)), ("b", range(3, 6)), ("c", range(20, 40))):
        slots.place(name, ids(tokens))
    slots.sequences[0] = None
    slots.move(2, 0)
    assert list(slots) == [(0, "c"), (1, "b")]
    assert slots.place("d", ids(range(20, 45))) == Placement(2, 2, 20)


def test_a_prompt_of_one_token_holds_nothing() -> None:
    slots: Slots[str] = Slots.empty(1, 64, 64)
    assert slots.place("a", ids()) == Placement(0, 0, 0)

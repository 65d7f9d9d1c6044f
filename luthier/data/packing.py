"""Lengths -> rows of the batch, and conversations -> the arrays of a row. Pure functions over numpy.

Packing is best fit: each conversation goes into the open row with the least room that still holds it, else into a new
row. Conversations are taken in the order given: a shuffled order fills rows of 1024 to 96% with GSM8K and does not sort
rows by length as best-fit-decreasing does, and the dataset's own order stays nearly as it was.

Arrays end in C for conversations and R for the rows they are packed into.

Left out on purpose: cutting a conversation in two to fill a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.types import Batch, Example


def best_fit(lengths_C: np.ndarray, row_length: int) -> np.ndarray:
    """Return ``row_C``, the row that each conversation is packed into; rows are numbered from 0 as they are opened.

    Rows are kept by the room left in them. The rooms in use are the bits of one integer, so that finding the tightest
    is a shift and a lowest bit: O(1) list operations and O(row_length / 64) machine words for each conversation.
    Raises ValueError for a length outside ``1..row_length``.
    """
    if len(lengths_C) and not 1 <= lengths_C.min() <= lengths_C.max() <= row_length:
        raise ValueError(f"lengths {lengths_C.min()}..{lengths_C.max()} do not fit rows of {row_length}")
    row_C = np.empty(len(lengths_C), np.int64)
    rows_by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms, opened = 0, 0
    for index, length in enumerate(lengths_C.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, opened = row_length, opened, opened + 1
        room -= length
        if room:
            rows_by_room[room].append(row)
            rooms |= 1 << room
        row_C[index] = row
    return row_C


def members(row_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (``members_C``, ``starts_R1``): row r holds ``members_C[starts_R1[r]:starts_R1[r + 1]]``."""
    members_C = np.argsort(row_C, kind="stable")
    starts_R1 = np.concatenate([[0], np.cumsum(np.bincount(row_C))]).astype(np.int64)
    return members_C, starts_R1


def collate(rows: Sequence[Sequence[Example]], row_length: int, pad_id: int = 0) -> Batch:
    """Lay out conversations side by side: ``rows[b]`` are those of row b, none for a row of padding alone.

    Returns int32 arrays and a bool mask, each ``[B, row_length]``, as ``Batch`` describes them; the mask is cleared on
    each segment's first token, which has nothing before it to be predicted from. Raises ValueError if a row overflows.
    """
    shape = (len(rows), row_length)
    batch = Batch(
        tokens_BT=np.full(shape, pad_id, np.int32),
        positions_BT=np.zeros(shape, np.int32),
        segments_BT=np.zeros(shape, np.int32),
        mask_BT=np.zeros(shape, bool),
    )
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            stop = start + len(example.ids_T)
            if stop > row_length:
                raise ValueError(f"row {row}: {stop} tokens or more in a row of {row_length}")
            batch.tokens_BT[row, start:stop] = example.ids_T
            batch.positions_BT[row, start:stop] = np.arange(stop - start)
            batch.segments_BT[row, start:stop] = segment
            batch.mask_BT[row, start + 1 : stop] = example.mask_T[1:]
            start = stop
    return batch

"""Packed rows -> batches, by Grain: shuffled by the seed, anew each epoch, sharded by host, read ahead.

The order is a pure function of the seed and the batch's number, so the state of an iterator is that one number: it can
be taken up with other settings for reading ahead. The last batch is filled up with empty rows rather than dropped, so
that few rows still train.

Left out on purpose: dropping an incomplete batch, and mixing several datasets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from luthier.data.packing import collate
from luthier.data.store import Tokens
from luthier.types import Batch, Example

FILLER = -1
"""The row number of an empty row."""
WORTH_PROCESSES = 200_000_000
"""Tokens from which reading ahead in processes pays: fewer stay in the page cache, where threads are as quick."""


class Rowed(TypedDict):
    """A batch and the packed row that each of its rows is; ``rows`` is -1 for an empty row."""

    batch: Batch
    rows: np.ndarray


@dataclass(frozen=True)
class Packed:
    """Which conversations lie in which row. Row r holds ``members_C[starts_R1[r]:starts_R1[r + 1]]``.

    ``lengths_C`` are the tokens kept of each member, in the members' order.
    """

    tokens: Tokens
    members_C: np.ndarray
    lengths_C: np.ndarray
    starts_R1: np.ndarray
    row_length: int

    def __len__(self) -> int:
        return len(self.starts_R1) - 1

    def examples(self, row: int) -> list[Example]:
        """Return the conversations in a row; none for the filler."""
        if row == FILLER:
            return []
        span = range(self.starts_R1[row], self.starts_R1[row + 1])
        return [self.tokens.example(int(self.members_C[i]), int(self.lengths_C[i])) for i in span]


class Batches(Iterator[Rowed]):
    """An iterator over batches whose state is the number of batches taken. ``len`` is the number in all."""

    def __init__(self, dataset: Any, worker_count: int):
        self._dataset, self._worker_count = dataset, worker_count
        self._taken = 0
        self._inner: Any = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __next__(self) -> Rowed:
        if self._taken >= len(self._dataset):
            self.close()
            raise StopIteration
        if self._inner is None:
            self._inner = _read_ahead(self._dataset[self._taken :], self._worker_count)
        batch = next(self._inner)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the state after the batches taken so far; JSON can hold it."""
        return {"batches": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on after the batches that ``state`` counts."""
        self.close()
        self._taken = state["batches"]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._inner is not None:
            self._inner.close()
        self._inner = None


def batches(
    packed: Packed,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_epochs: float | None = 1.0,
    process_index: int = 0,
    process_count: int = 1,
    worker_count: int = 0,
) -> Batches:
    """Return an iterator over batches of ``batch_size`` rows for this process; ``None`` epochs never end.

    All processes together go through the rows ``num_epochs`` times, each row once an epoch and on one process, and
    all get equally many batches. ``worker_count`` processes read ahead where the dataset is too large for threads.
    """
    import grain

    dataset = grain.MapDataset.range(len(packed))
    if shuffle:
        dataset = dataset.shuffle(seed=seed % 2**32)
    if num_epochs is None:
        dataset = dataset.repeat()
    else:
        total = math.ceil(len(packed) * num_epochs)
        dataset = dataset.repeat(math.ceil(num_epochs))[:total]
        missing = -total % (batch_size * process_count)
        if missing:
            dataset = grain.MapDataset.concatenate([dataset, grain.MapDataset.source([FILLER] * missing)])
    dataset = dataset[process_index::process_count].batch(batch_size).map(functools.partial(_build, packed))
    large = len(packed) * packed.row_length >= WORTH_PROCESSES
    return Batches(dataset, worker_count if large else 0)


def _build(packed: Packed, rows_B: np.ndarray) -> Rowed:
    batch = collate([packed.examples(row) for row in rows_B.tolist()], packed.row_length)
    return {"batch": batch, "rows": rows_B}


def _read_ahead(dataset: Any, worker_count: int) -> Any:
    import grain

    if not worker_count:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Grain asks absl for its flags before it starts processes; ours is not an absl program.
        flags.FLAGS.mark_as_parsed()
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    options = grain.MultiprocessingOptions(num_workers=worker_count, per_worker_buffer_size=4)
    return iter(iterable.mp_prefetch(options))

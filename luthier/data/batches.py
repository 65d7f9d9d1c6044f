"""Packed rows -> batches, by Grain: shuffled by the seed, anew each epoch, shared by processes, read ahead.

The order of rows is a pure function of the seed, so the state of an iterator is the number of rows taken: it can be
taken up with other settings for reading ahead, for more epochs, and by more or fewer processes. What would make other
batches of them (other rows, another seed, more rows in a batch) is part of the state too, and refused. The last batch
is filled up with empty rows rather than dropped, so that few rows still train.

Left out on purpose: dropping an incomplete batch, and mixing several datasets.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np

from luthier.data.packing import collate
from luthier.data.rows import digest
from luthier.data.store import Tokens
from luthier.errors import RunError, UserError
from luthier.types import Batch, Example

FILLER = -1
"""The row number of an empty row."""
_LOST = "Worker process was terminated unexpectedly"
"""What Grain says where a process is gone."""
_LOGGER = logging.getLogger(__name__)
TOKENS_WORTH_PROCESSES = 200_000_000
"""Tokens from which reading ahead in processes pays: fewer stay in the page cache, where threads are as quick."""


class Rowed(TypedDict):
    """This process's rows of a batch, and the packed row that each row of all processes is; -1 is an empty row."""

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

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the rows: of tokens, masks and their places, not of what they were made by."""
        places = (self.members_C, self.lengths_C, self.starts_R1)
        return digest(self.tokens.fingerprint, *(part.astype("<i8").tobytes() for part in places), str(self.row_length))

    def examples(self, row: int) -> list[Example]:
        """Return the conversations in a row; none for the filler."""
        if row == FILLER:
            return []
        span = range(self.starts_R1[row], self.starts_R1[row + 1])
        return [self.tokens.example(int(self.members_C[i]), int(self.lengths_C[i])) for i in span]


class State(TypedDict):
    """Where an iterator is: ``rows`` taken by all processes together, of which ``batch_size`` are in a batch."""

    rows: int
    batch_size: int
    fingerprint: str


class Batches(Iterator[Rowed]):
    """An iterator over batches that can be resumed after any of them. ``len`` is the number of those to come.

    ``dataset_from`` gives Grain's dataset of this process's batches from a row on; ``total`` rows are taken by all
    processes, ``batch_size`` at once; ``fingerprint`` stands for the rows and their order.
    """

    def __init__(
        self,
        dataset_from: Callable[[int], Any],
        total: int,
        batch_size: int,
        fingerprint: Callable[[], str],
        worker_count: int,
    ):
        self._dataset_from, self._total, self._batch_size = dataset_from, total, batch_size
        self._fingerprint, self._worker_count = fingerprint, worker_count
        self._rows = 0
        self._lost_at = -1
        self._inner: Any = None

    def __len__(self) -> int:
        return max(0, math.ceil((self._total - self._rows) / self._batch_size))

    def __next__(self) -> Rowed:
        if not len(self):
            self.close()
            raise StopIteration
        if self._inner is None:
            self._inner = _read_ahead(self._dataset_from(self._rows), self._worker_count)
        try:
            batch = next(self._inner)
        except RuntimeError as error:
            if _LOST not in str(error):
                raise
            self._begin_again(str(error))
            return next(self)
        # Empty rows do not count: with more epochs, what comes next is the row in their place.
        self._rows = min(self._rows + self._batch_size, self._total)
        return batch

    def get_state(self) -> State:
        """Return the state after the batches taken so far; JSON can hold it, and it is alike on all processes."""
        return {"rows": self._rows, "batch_size": self._batch_size, "fingerprint": self._fingerprint()}

    def set_state(self, state: State) -> None:
        """Go on with the first row that is not counted in ``state``.

        Raises UserError where the batches to come would not continue those taken.
        """
        if state["batch_size"] != self._batch_size:
            raise UserError(
                f"the run was begun with {state['batch_size']} rows in a step over all devices, and would go on with "
                f"{self._batch_size}. Give it per_device_batch_size and gradient_accumulation_steps which, times the "
                "devices that rows are split over, make as many again, or another run_name."
            )
        if state["fingerprint"] != self._fingerprint():
            raise UserError(
                "the rows to train on are not those that the run was begun with: the dataset, tokenizer, chat "
                "template, max_target_length, packing, shuffling or seed has changed. Restore it, or give another "
                "run_name."
            )
        self.close()
        self._rows = state["rows"]

    def _begin_again(self, reason: str) -> None:
        """Start other processes for the rows to come, which are the same; but not twice for the same batch."""
        self.close()
        reason = reason.partition(". ")[0]
        if self._lost_at == self._rows:
            raise RunError(
                f"a process that reads data ended twice, before the batch that begins with row {self._rows} of the "
                f"run: {reason}. The machine may be out of memory: set grain_worker_count=0 to read in this process, "
                "and give the same command again. It goes on from the last checkpoint."
            )
        self._lost_at = self._rows
        _LOGGER.warning("A process that reads data ended (%s). Others go on in its place; no row is lost.", reason)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._inner is not None:
            self._inner.close()
        self._inner = None


def import_reader() -> None:
    """Import Grain, before other threads work: while it is imported, what they import comes out broken.

    It makes some imports of its own lazy by replacing Python's, for all threads.
    """
    import grain  # noqa: F401


def batches(
    packed: Packed,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_epochs: float = 1.0,
    own: Sequence[int] | np.ndarray | None = None,
    worker_count: int = 0,
) -> Batches:
    """Return an iterator over batches of ``batch_size`` rows, of which this process reads those at the places ``own``.

    The rows are gone through ``num_epochs`` times, each once an epoch. What a batch is made of does not depend on how
    many processes share it; by default this one reads all. ``worker_count`` processes read ahead where the dataset is
    too large for threads.
    """
    import grain

    order = grain.MapDataset.range(len(packed))
    if shuffle:
        order = order.shuffle(seed=seed % 2**32)
    order = order.repeat(math.ceil(num_epochs))
    total = math.ceil(len(packed) * num_epochs)
    places = np.arange(batch_size) if own is None else np.asarray(own)

    def dataset_from(row: int) -> Any:
        starts = grain.MapDataset.range(row, total, batch_size)
        return starts.map(functools.partial(_numbers, order, total, batch_size)).map(
            functools.partial(_build, packed, places)
        )

    def fingerprint() -> str:
        return digest(packed.fingerprint, f"shuffled by {seed}" if shuffle else "in order")

    large = len(packed) * packed.row_length >= TOKENS_WORTH_PROCESSES
    return Batches(dataset_from, total, batch_size, fingerprint, worker_count if large else 0)


def _numbers(order: Any, total: int, batch_size: int, start: int) -> np.ndarray:
    """Return the rows of the batch that begins with row ``start`` of the order, filled up at its end."""
    stop = min(start + batch_size, total)
    return np.array([*(order[place] for place in range(start, stop)), *[FILLER] * (start + batch_size - stop)])


def _build(packed: Packed, places: np.ndarray, rows_B: np.ndarray) -> Rowed:
    batch = collate([packed.examples(row) for row in rows_B[places].tolist()], packed.row_length)
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

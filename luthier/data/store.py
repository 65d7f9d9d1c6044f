"""Tokenised conversations in a cache folder of memory-mapped arrays.

Everything is tokenised before training, so that the number of steps is known and packing can be tight; the second run
on the same rows, tokenizer and template finds the arrays by their fingerprint and starts at once. Lengths are not
limited here: another ``max_target_length`` uses the same arrays.

Left out on purpose: clearing the cache; the folder may be deleted at any time between runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data import chat
from luthier.data.rows import Rows, digest
from luthier.data.schemas import RowError, Selection
from luthier.errors import RunError, UserError
from luthier.types import Example

CHUNK = 256
"""Rows that are tokenised together."""
ROWS_WORTH_PROCESSES = 20_000
"""Rows from which starting processes pays: they take seconds to start, a thousand rows take about one."""

PROGRESS_SECONDS = 0.25
"""Least time between two calls of ``Progress``."""

Progress = Callable[[int, int], None]
"""Told the rows that are tokenised, and how many there are."""


@dataclass(frozen=True)
class Job:
    """All that turning rows into tokens depends on."""

    rows: Rows
    selection: Selection
    tokenizer: Any
    how: chat.Rendering

    def fingerprint(self) -> str:
        """Return a hash of rows, columns, tokenizer, template and the code that reads them."""
        tokenizer = self.tokenizer
        code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        settings = [repr(self.selection), repr(self.how), repr(tokenizer.chat_template)]
        words = [tokenizer.backend_tokenizer.to_str(), repr(tokenizer.special_tokens_map), type(tokenizer).__name__]
        return digest(self.rows.fingerprint, *settings, *words, version("transformers"), *code)


@dataclass(frozen=True)
class Chunk:
    """Some tokenised rows: their tokens and masks end to end, and counts of what a user should be warned of."""

    ids_T: np.ndarray
    mask_T: np.ndarray
    lengths_C: np.ndarray
    trained_C: np.ndarray
    silent_C: np.ndarray
    warnings: Counter[str]


class Tokens:
    """The conversations of a dataset, reopened from ``folder`` wherever this is unpickled.

    ``trained_C`` counts the trained tokens of each, but for its first, which nothing precedes.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokens, (self.folder,)

    @cached_property
    def ids_T(self) -> np.ndarray:
        """All token ids, end to end, int32."""
        return np.load(self.folder / "ids.npy", mmap_mode="r")

    @cached_property
    def mask_T(self) -> np.ndarray:
        """All masks, end to end, bool."""
        return np.load(self.folder / "mask.npy", mmap_mode="r")

    @cached_property
    def lengths_C(self) -> np.ndarray:
        """Tokens of each conversation."""
        return np.load(self.folder / "lengths.npy")

    @cached_property
    def trained_C(self) -> np.ndarray:
        """Trained tokens of each conversation."""
        return np.load(self.folder / "trained.npy")

    @cached_property
    def silent_C(self) -> np.ndarray:
        """Whether a reply of each conversation is empty."""
        return np.load(self.folder / "silent.npy")

    @cached_property
    def starts_C(self) -> np.ndarray:
        """Where each conversation begins."""
        return np.cumsum(self.lengths_C) - self.lengths_C

    @cached_property
    def warnings(self) -> dict[str, int]:
        """Sentences for the user, and how many rows each is about."""
        return self._about["warnings"]

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and masks themselves, alike whatever they were made by."""
        return self._about["fingerprint"]

    @cached_property
    def _about(self) -> dict[str, Any]:
        return json.loads((self.folder / "about.json").read_text())

    def __len__(self) -> int:
        return len(self.lengths_C)

    def example(self, index: int, length: int) -> Example:
        """Return the first ``length`` tokens of a conversation."""
        start = int(self.starts_C[index])
        return Example(self.ids_T[start : start + length], self.mask_T[start : start + length])


def tokens(job: Job, workers: int, on_progress: Progress | None = None) -> Tokens:
    """Return the job's rows as tokens, from the cache or, in ``workers`` processes where that pays, made now.

    ``on_progress`` is called in this process while they are made, a few times a second and at the end. Raises
    UserError naming the row that cannot be read or rendered, and RunError where the cache cannot be written.
    """
    folder = cache_folder() / job.fingerprint()
    if not folder.is_dir():
        _write(folder, _chunks(job, workers), len(job.rows), on_progress)
    return Tokens(folder)


def cache_folder() -> Path:
    """Return the folder of tokenised datasets."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "luthier" / "tokens"


def tokenise_range(job: Job, start: int, stop: int) -> Chunk:
    """Return rows ``start`` to ``stop`` of the job as tokens. Raises UserError naming the bad row."""
    warnings: Counter[str] = Counter()
    rendered, silent = [], []
    for index in range(start, stop):
        row = job.rows[index]
        try:
            conversation = job.selection.read(row)
            rendered.append(chat.to_text(job.tokenizer, conversation, job.how))
            silent.append(chat.is_silent(conversation))
            warnings.update(chat.template_gaps(job.tokenizer, conversation, job.how, rendered[-1]))
        except RowError as error:
            raise UserError(f"{job.rows.place(index)}: {error}") from None
    examples = chat.tokenise(job.tokenizer, rendered)
    end_ids = chat.end_tokens(job.tokenizer)
    endless = sum(bool(example.mask_T.any()) and not chat.trains_end(example, end_ids) for example in examples)
    if endless:
        warnings["no end-of-turn token is trained, so the model may not learn to stop"] += endless
    return Chunk(
        ids_T=np.concatenate([example.ids_T for example in examples]),
        mask_T=np.concatenate([example.mask_T for example in examples]),
        lengths_C=np.array([len(example.ids_T) for example in examples], np.int64),
        trained_C=np.array([example.mask_T[1:].sum() for example in examples], np.int64),
        silent_C=np.array(silent, bool),
        warnings=warnings,
    )


def _chunks(job: Job, workers: int) -> Iterator[Chunk]:
    count = len(job.rows)
    ranges = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    if workers < 2 or count < ROWS_WORTH_PROCESSES:
        # One process that waits for one other gains nothing; the tokenizer has threads of its own.
        yield from (tokenise_range(job, *bounds) for bounds in ranges)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Spawned, since a forked child could hang on locks of jax's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (job,)) as pool:
        yield from pool.map(_work, ranges)


_job: Job


def _start(job: Job) -> None:
    global _job
    _job = job


def _work(bounds: tuple[int, int]) -> Chunk:
    return tokenise_range(_job, *bounds)


def _write(folder: Path, chunks: Iterator[Chunk], count: int, on_progress: Progress | None) -> None:
    """Write the arrays beside ``folder`` and rename them into place, so that what is there is always whole."""
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        made = _collect(chunks, count, on_progress)
        with _writing(folder.parent):
            _save(draft, made)
            _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write tokens to {folder}: {error}. Make room there, or set XDG_CACHE_HOME to a folder with room."
        ) from None


def _collect(chunks: Iterator[Chunk], count: int, on_progress: Progress | None) -> list[Chunk]:
    made: list[Chunk] = []
    done, told = 0, time.monotonic()
    for chunk in chunks:
        made.append(chunk)
        done += len(chunk.lengths_C)
        now = time.monotonic()
        if on_progress is not None and (done == count or now - told >= PROGRESS_SECONDS):
            told = now
            on_progress(done, count)
    return made


def _save(draft: Path, made: list[Chunk]) -> None:
    arrays = {
        "ids": np.concatenate([chunk.ids_T for chunk in made]),
        "mask": np.concatenate([chunk.mask_T for chunk in made]),
        "lengths": np.concatenate([chunk.lengths_C for chunk in made]),
        "trained": np.concatenate([chunk.trained_C for chunk in made]),
        "silent": np.concatenate([chunk.silent_C for chunk in made]),
    }
    for name, array in arrays.items():
        np.save(draft / f"{name}.npy", array)
    fingerprint = digest(*(arrays[name].view(np.uint8).data for name in ("ids", "mask", "lengths")))
    about = {"warnings": sum((chunk.warnings for chunk in made), Counter()), "fingerprint": fingerprint}
    (draft / "about.json").write_text(json.dumps(about))


def _publish(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # Another process may have made the same arrays meanwhile; they are as good.
        if not folder.is_dir():
            raise

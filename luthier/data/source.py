"""The configuration's data keys -> tokenised, packed rows to train on and to evaluate on.

Left out on purpose: streaming. Everything is tokenised first, so that the number of steps is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data import chat, files, packing, schemas, store
from luthier.data.batches import Batches, Packed, batches
from luthier.data.formatter import Formatted
from luthier.data.rows import Rows
from luthier.errors import UserError
from luthier.types import Example


@dataclass(frozen=True)
class Report:
    """What became of a split's rows, and which columns of them were read.

    ``schema`` is a key of ``schemas.SCHEMAS``. ``efficiency`` is the share of the packed rows' positions with tokens.
    """

    source: str
    schema: str
    columns: str
    rows: int
    conversations: int
    dropped: int
    truncated: int
    untrained: int
    tokens: int
    trained_tokens: int
    packed_rows: int
    efficiency: float
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """Return one line for a run's header."""
        counts = [f"{self.rows:,} rows ({self.columns})"]
        counts += [f"{n:,} {name}" for name in ("dropped", "truncated", "untrained") if (n := getattr(self, name))]
        share = self.trained_tokens / self.tokens
        return (
            f"{', '.join(counts)}; {self.tokens:,} tokens, {share:.0%} trained; "
            f"{self.packed_rows:,} packed rows, {self.efficiency:.0%} full"
        )


@dataclass(frozen=True)
class TokenRows:
    """One split after tokenising and packing. ``len`` is the number of packed rows."""

    packed: Packed
    rows: Rows
    report: Report

    def __len__(self) -> int:
        return len(self.packed)

    def example(self, row: int) -> Example:
        """Return the first conversation of a packed row, as it is trained on."""
        return self.packed.examples(row)[0]

    def check_vocabulary(self, size: int) -> None:
        """Raise UserError where a token has no place in a vocabulary of ``size``: the tokenizer is another model's."""
        ids_T = self.packed.tokens.ids_T
        if ids_T.max(initial=0) < size:
            return
        first = int(np.argmax(ids_T >= size))
        conversation = int(np.searchsorted(self.packed.tokens.starts_C, first, side="right")) - 1
        raise UserError(
            f"{self.rows.place(conversation)}: token id {int(ids_T[first])} is over the model's vocabulary of {size}. "
            "The tokenizer is not this model's: set tokenizer_path to the one it was trained with."
        )

    def source_rows(self, row: int) -> list[int]:
        """Return the dataset's rows (from 0) that lie in a packed row."""
        start, stop = self.packed.starts_R1[row : row + 2]
        return self.packed.members_C[start:stop].tolist()

    def places(self, row: int) -> list[str]:
        """Return where those rows stand (file and line), for naming a bad batch."""
        return [self.rows.place(index) for index in self.source_rows(row)]


def load(keys: Any, tokenizer: Any, on_progress: store.Progress | None = None) -> tuple[TokenRows, TokenRows | None]:
    """Return the training rows and the held-out rows, if any are asked for.

    ``keys`` is the configuration (its data group, ``seed`` and ``hf_access_token``). ``on_progress`` is called with
    the rows tokenised and their number, split by split; not for a split that was tokenised before. Raises UserError
    for all that can be wrong with the dataset, RunError where tokens cannot be written.
    """
    how = chat.rendering(keys, tokenizer)
    train, held_out = open_rows(keys)
    shuffled = keys.seed if keys.enable_data_shuffling else None
    settings = {
        "limit": keys.max_target_length,
        "best_fit": keys.packing,
        "drop": keys.overlong_rows == "drop",
        "workers": keys.grain_worker_count,
        "on_progress": on_progress,
    }
    trained = token_rows(store.Job(train, selection(keys, train), tokenizer, how), seed=shuffled, **settings)
    if held_out is None:
        return trained, None
    return trained, token_rows(store.Job(held_out, selection(keys, held_out), tokenizer, how), **settings)


def open_rows(keys: Any) -> tuple[Rows, Rows | None]:
    """Return the rows that ``keys`` name for training and for evaluation, formatted but not yet read."""
    splits = files.open_splits(keys.hf_path, keys.hf_name, keys.hf_access_token)
    train = formatted(keys, files.open_split(splits, keys.train_split, keys.hf_path, "train_split"))
    if keys.hf_eval_path:
        splits = files.open_splits(keys.hf_eval_path, None, keys.hf_access_token, "hf_eval_path")
        split = keys.hf_eval_split or next(name for name in ("validation", "test", *splits) if name in splits)
        return train, formatted(keys, files.open_split(splits, split, keys.hf_eval_path, "hf_eval_split"))
    if keys.hf_eval_split:
        return train, formatted(keys, files.open_split(splits, keys.hf_eval_split, keys.hf_path, "hf_eval_split"))
    return files.hold_out(train, keys.eval_fraction, keys.seed) if keys.eval_fraction else (train, None)


def selection(keys: Any, rows: Rows) -> schemas.Selection:
    """Return which columns to read: those of the key, but those that a formatter added if they make a schema.

    The key stays in force where it names columns that the formatter added or rewrote itself.
    """
    wanted = keys.train_data_columns
    if isinstance(rows, Formatted):
        added, asked = schemas.recognise(rows.added), schemas.recognise(wanted or ())
        if added is not None and (asked is None or not set(asked.required) & set(rows.changed)):
            return added
    return schemas.select(wanted, rows.columns, rows.source)


def formatted(keys: Any, rows: Rows) -> Rows:
    """Return the rows as the function of the key ``formatting_func_path`` rewrites them, if there is one."""
    path = keys.formatting_func_path
    return Formatted(rows, path, keys.formatting_func_kwargs) if path else rows


def token_rows(
    job: store.Job,
    *,
    limit: int,
    best_fit: bool = True,
    drop: bool = False,
    seed: int | None = None,
    workers: int = 0,
    on_progress: store.Progress | None = None,
) -> TokenRows:
    """Tokenise the job's rows and pack them into rows of ``limit`` tokens, in their order or a random one by ``seed``.

    What is over the limit is cut off, or dropped. Raises UserError where there is nothing to train on or to score.
    """
    rows = job.rows
    tokens = store.tokens(job, workers, on_progress)
    over_C = tokens.lengths_C > limit
    trained_C = tokens.trained_C.copy()
    for index in np.flatnonzero(over_C):
        trained_C[index] = 0 if drop else tokens.example(int(index), limit).mask_T[1:].sum()
    dropped_C = over_C if drop else np.zeros_like(over_C)
    untrained_C = (trained_C == 0) & ~dropped_C
    kept = np.flatnonzero(trained_C > 0)
    if tokens.silent_C.all():
        raise UserError(
            f"{rows.source}: a reply is empty in each of its {len(tokens)} rows (first: {rows.place(0)}). Are the "
            f"columns read ({job.selection.described(rows.columns)}) the right ones? Set train_data_columns."
        )
    if not len(kept):
        raise UserError(_nothing_to_train(rows, tokens, untrained_C, limit))
    if seed is not None:
        kept = np.random.default_rng(seed).permutation(kept)
    packed = _pack(tokens, kept, limit, best_fit)
    used = int(packed.lengths_C.sum())
    report = Report(
        source=rows.source,
        schema=job.selection.schema,
        columns=job.selection.described(rows.columns),
        rows=len(tokens),
        conversations=len(kept),
        dropped=int(dropped_C.sum()),
        truncated=int((over_C & (trained_C > 0)).sum()),
        untrained=int(untrained_C.sum()),
        tokens=used,
        trained_tokens=int(trained_C.sum()),
        packed_rows=len(packed),
        efficiency=used / (len(packed) * limit),
        warnings=_warnings(rows, tokens, untrained_C, limit),
    )
    return TokenRows(packed, rows, report)


def _pack(tokens: store.Tokens, kept_C: np.ndarray, limit: int, best_fit: bool) -> Packed:
    lengths_C = np.minimum(tokens.lengths_C[kept_C], limit)
    row_C = packing.best_fit(lengths_C, limit) if best_fit else np.arange(len(kept_C))
    order_C, starts_R1 = packing.members(row_C)
    return Packed(tokens, kept_C[order_C], lengths_C[order_C], starts_R1, limit)


def _nothing_to_train(rows: Rows, tokens: store.Tokens, untrained_C: np.ndarray, limit: int) -> str:
    longest = f"The longest row has {int(tokens.lengths_C.max(initial=0))} tokens."
    if not untrained_C.any():
        return f"{rows.source}: all {len(tokens)} rows are over max_target_length={limit}, and dropped. {longest}"
    first = rows.place(int(np.flatnonzero(untrained_C)[0]))
    if tokens.trained_C.any():
        return (
            f"{rows.source}: no row has a trained token within max_target_length={limit}: prompts alone fill it "
            f"(first: {first}). {longest} Raise max_target_length."
        )
    return (
        f"{rows.source}: none of its {len(tokens)} rows has a trained token (first: {first}). Are there replies "
        "(role `assistant`) in the columns read, and does the chat template print them? "
        "sft_train_on_completion_only=false trains on everything."
    )


def _warnings(rows: Rows, tokens: store.Tokens, untrained_C: np.ndarray, limit: int) -> tuple[str, ...]:
    total = len(tokens)
    found = [f"{text} ({count:,} of {total:,} rows)" for text, count in tokens.warnings.items()]
    cut_C = untrained_C & (tokens.trained_C > 0)
    for chosen_C, text in (
        (cut_C, f"the prompt alone fills max_target_length={limit}, so nothing of it is trained"),
        (untrained_C & ~cut_C, "no trained token, so the row is left out"),
        (tokens.silent_C, "an empty reply, from which the model learns to say nothing"),
    ):
        if chosen_C.any():
            indices = np.flatnonzero(chosen_C)
            places = "; ".join(rows.place(int(index)) for index in indices[:3])
            found.append(f"{text} ({len(indices):,} of {total:,} rows: {places}{', ...' if len(indices) > 3 else ''})")
    return tuple(found)


__all__ = ["Batches", "Report", "TokenRows", "batches", "formatted", "load", "open_rows", "selection", "token_rows"]

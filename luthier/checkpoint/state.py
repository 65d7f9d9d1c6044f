"""The whole train state on disk, so that the same command goes on where it stopped, bit for bit.

Orbax writes a checkpoint under another name and renames it when it is whole, so a process killed in the middle leaves
the one before. Left out on purpose: when to save (the training loop knows), and the weights for others to read
(``huggingface``).
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from luthier.checkpoint import disk
from luthier.errors import RunError, UserError

Tree = Any


class Checkpoints:
    """The folder ``checkpoints/`` of a run, one folder a step inside; every process makes one and calls it alike.

    ``keep`` is how many of the newest stay; an older one goes only after a newer one is whole. With ``asynchronous``,
    ``save`` returns when the arrays are copied and writes while training goes on. Use it as a context, or ``close`` it,
    so that what is being written is finished.

    A disk that refuses raises RunError, which says what still stands: at once, or where the writing goes on behind
    training, from the next ``save`` or from ``close``.
    """

    def __init__(self, folder: Path, *, keep: int = 1, asynchronous: bool = True) -> None:
        import orbax.checkpoint as ocp

        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        logging.getLogger("absl").addFilter(_not_raised_anyway)
        with self._writing():
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        self._args = ocp.args

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RunError as unsaved:
            if not isinstance(error, Exception):  # a signal's exit, too, has promised a checkpoint
                raise
            error.add_note(str(unsaved))  # what ended the run comes first

    def latest(self) -> int | None:
        """Return the newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, data: dict[str, Any]) -> None:
        """Save ``state``, a pytree of arrays, and this process's ``data``, which JSON can hold; once for each step."""
        if step in self._manager.all_steps():
            return
        items = {
            "state": self._args.StandardSave(state),
            "data": self._args.JsonSave({"processes": _gather(data)}),
        }
        with self._writing():
            self._manager.save(step, args=self._args.Composite(**items), force=True)

    def restore(self, abstract: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Return the state and this process's data of ``step``, by default the newest.

        ``abstract`` gives each array's shape, type and sharding, which may be another mesh's than the one that saved.
        Raises UserError where there is no checkpoint, it holds other arrays, or another number of processes saved it.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self._folder}: no checkpoint to resume from.")
        place = self._folder / str(step)
        items = {"state": self._args.StandardRestore(abstract), "data": self._args.JsonRestore()}
        self._check(step, abstract, place)
        restored = self._manager.restore(step, args=self._args.Composite(**items))
        processes = restored["data"]["processes"]
        if len(processes) != jax.process_count():
            raise UserError(
                f"{place}: saved by {len(processes)} processes, resumed by {jax.process_count()}. "
                "Resume on as many hosts, or set another run_name and start from the saved model."
            )
        return restored["state"], processes[jax.process_index()]

    def close(self) -> None:
        """Finish what is being written."""
        with self._writing():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return disk.writing(self._folder, "a checkpoint", self._what_stands)

    def _what_stands(self) -> str:
        whole = [int(path.name) for path in self._folder.glob("*") if path.name.isdigit()]
        remedy = "Free space or mend the folder, and run the same command again"
        if not whole:
            return f"No checkpoint is there. {remedy}."
        return f"The checkpoint of step {max(whole)} stands. {remedy}: it goes on from there."

    def _check(self, step: int, abstract: Tree, place: Path) -> None:
        """Compare names, shapes and types with the checkpoint's metadata, since Orbax would cast or crop silently."""
        found = _shapes(self._manager.item_metadata(step)["state"].tree)
        wanted = _shapes(abstract)
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if different:
            first = different[0]
            raise UserError(
                f"{place}: {len(different)} arrays of the train state differ from what the keys ask for, the first "
                f"`{first}`: {found.get(first, 'missing')} saved, {wanted.get(first, 'none')} wanted. "
                "Resume with the same model, optimizer and types, or set another run_name."
            )


def _not_raised_anyway(record: logging.LogRecord) -> bool:
    """Keep Orbax from printing the traceback of an error in each of its threads, all of which it raises here too."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


def _shapes(tree: Tree) -> dict[str, str]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in flat}


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf alike whether its parents are dictionaries, tuples or dataclasses, as Orbax's metadata does."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _gather(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every process's ``data``, in the order of the processes."""
    if jax.process_count() == 1:
        return [data]
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

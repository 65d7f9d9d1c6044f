"""The whole train state on disk, so that the same command goes on where it stopped, bit for bit.

Orbax writes a checkpoint under another name and renames it when it is whole, so a process killed in the middle leaves
the one before. Beside the arrays lies a record of them, sealed by its own hash: their shapes, their checksums and the
place in the data, by which a checkpoint that its disk has damaged is known. Such a one is set aside, loudly, and the
one before it taken.

Left out on purpose: when to save (the training loop knows), and the weights for others to read (``huggingface``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from luthier import processes, remote
from luthier.checkpoint import checksums, disk
from luthier.errors import RunError, UserError

Tree = Any


class Checkpoints:
    """The folder ``checkpoints/`` of a run, one folder a step inside; every process makes one and calls it alike.

    It may be a ``gs://`` address, to which each process writes its own part itself.

    ``keep`` is how many of the newest stay; an older one goes only after a newer one is whole. With ``asynchronous``,
    ``save`` returns when the arrays are copied and writes while training goes on. ``warn`` is told of a checkpoint that
    is damaged. Use it as a context, or ``close`` it, so that what is being written is finished.

    A disk that refuses raises RunError, which says what still stands: at once, or where the writing goes on behind
    training, from the next ``save`` or from ``close``.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int = 1,
        asynchronous: bool = True,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        import orbax.checkpoint as ocp
        from etils import epath

        self._folder = epath.Path(folder) if remote.is_url(str(folder)) else Path(folder).absolute()
        self._warn = warn
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(not_raised_anyway)
        with self._writing():
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        self._args, self._arrays = ocp.args, handlers["state"]

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

    def data(self) -> dict[str, Any] | None:
        """Return the data of the newest checkpoint; None where there is none, or its record is damaged."""
        step = self.latest()
        try:
            return None if step is None else self._record(step)["data"]
        except _Damaged:
            return None

    def save(self, step: int, state: Tree, data: dict[str, Any]) -> None:
        """Save ``state``, a pytree of arrays, and ``data``, which JSON can hold; once for each step.

        ``data`` is the same on every process and written once, so that any number of processes can restore it.
        """
        if step in self._manager.all_steps():
            return
        arrays = _named(state)
        record = {"arrays": _described(arrays), "checksums": checksums.of(arrays), "data": data}
        items = {"state": self._args.StandardSave(state), "data": self._args.JsonSave(_sealed(record))}
        with self._writing():
            self._manager.save(step, args=self._args.Composite(**items), force=True)

    def restore(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Return the state and the data of the newest checkpoint that is not damaged.

        ``abstract`` gives each array's shape, type and sharding, which may be another mesh's than the one that saved.
        Damaged ones that are newer are renamed to ``STEP.damaged``, and ``warn`` is told.

        Raises UserError where there is no checkpoint or it holds other arrays, and RunError where all are damaged or
        the disk does not let them be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, abstract)
            except _Damaged as damage:
                damaged[step] = str(damage)
                continue
            self._set_aside(damaged, step)
            return found
        if not damaged:
            raise UserError(f"{self._folder}: no checkpoint to resume from.")
        listed = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise RunError(
            f"{self._folder}: no checkpoint is whole ({listed}). Put one back from a copy, or remove this folder to "
            "begin again. (A higher max_num_checkpoints_to_keep leaves an older one to go on from.)"
        )

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

    def _read(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Return what ``restore`` does, of one step. Raises ``_Damaged``, on all processes where it is so on one."""
        place, state, why = self._folder / str(step), None, ""
        try:
            record = self._record(step)
            _check(record["arrays"], abstract, place)
            state = self._arrays.restore(place / "state", args=self._args.StandardRestore(abstract))
        except _Damaged as damage:
            why = str(damage)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of a damaged index, Orbax raises whatever it stumbles over
            why = _damage(error, place)
        if whys := [said for said in processes.gather(why) if said]:
            raise _Damaged(whys[0])
        found = checksums.of(_named(state))
        if wrong := sorted(name for name, value in record["checksums"].items() if found[name] != value):
            raise _Damaged(f"{len(wrong)} of {len(found)} arrays are not what was saved, the first `{wrong[0]}`")
        return state, record["data"]

    def _record(self, step: int) -> dict[str, Any]:
        """Return what ``save`` wrote beside the arrays. Raises ``_Damaged`` where its seal is broken."""
        path = self._folder / str(step) / "data" / "metadata"
        try:
            record = json.loads(path.read_bytes())
            seal = record.pop("seal")
        except FileNotFoundError:
            raise _Damaged("its record is missing") from None
        except OSError as error:
            raise _Damaged(_damage(error, path)) from None
        except (ValueError, KeyError, AttributeError):
            raise _Damaged("its record is garbled") from None
        if _sealed(record)["seal"] != seal:
            raise _Damaged("its record is not what was saved")
        return record

    def _set_aside(self, damaged: dict[int, str], whole: int) -> None:
        for step, why in damaged.items():
            place = self._folder / str(step)
            aside = place.with_name(f"{step}.damaged")
            if processes.is_first():
                with self._writing():
                    _move(place, aside)
            self._warn(
                f"{place}: damaged ({why}). It is kept as {aside.name}, and the run goes on after step {whole}, from "
                "the checkpoint before it. Is the disk sound?"
            )
        if damaged:
            processes.wait("damaged checkpoints are set aside")
            self._manager.reload()


def _move(place: Any, aside: Any) -> None:
    if remote.is_url(str(place)):
        remote.move(str(place), str(aside))
    else:
        place.rename(aside)


class _Damaged(Exception):
    """A checkpoint is not what was saved; says in what."""


def _check(saved: dict[str, str], abstract: Tree, place: Any) -> None:
    """Compare names, shapes and types with the record's, since Orbax would cast or crop silently."""
    wanted = _described(_named(abstract))
    different = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if different:
        first = different[0]
        raise UserError(
            f"{place}: {len(different)} arrays of the train state differ from what the keys ask for, the first "
            f"`{first}`: {saved.get(first, 'missing')} saved, {wanted.get(first, 'none')} wanted. "
            "Resume with the same model, optimizer and types, or set another run_name."
        )


def _damage(error: Exception, place: Any) -> str:
    """Return in what a checkpoint is damaged. Raises RunError where it is the system that does not let it be read."""
    reason = disk.refusal(error)
    if reason is not None:
        raise RunError(f"{place}: cannot be read ({reason}). Mend that, and run the same command again.") from error
    said = str(error.__cause__ or error).partition(" [")[0].partition("\n")[0]
    return f"it cannot be read: {said[:200] or type(error).__name__}"


def not_raised_anyway(record: logging.LogRecord) -> bool:
    """Keep Orbax from printing the traceback of an error in each of its threads, all of which it raises here too."""
    return not (record.exc_info and {"orbax", "asyncio"} & set(Path(record.pathname).parts))


def _named(tree: Tree) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in flat}


def _described(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf alike whether its parents are dictionaries, tuples or dataclasses, as Orbax does."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(record, sort_keys=True)
    return record | {"seal": hashlib.sha256(text.encode()).hexdigest()}

"""JSON lines, to standard output, to a device or a pipe, or into a file that is whole or not there.

Left out on purpose: appending to what an earlier run wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from luthier.checkpoint import disk
from luthier.errors import UserError

Put = Callable[[dict[str, Any]], None]


def check(name: str, prompts_path: str = "") -> None:
    """Refuse an ``output_path`` that cannot be written, or that takes something's place, before anything is computed.

    Raises UserError for a place that is a folder, is not there or takes no writing, for the file that the prompts are
    read from, and where what a run that was stopped had finished still lies.
    """
    if is_standard(name):
        return
    path = _place(name)
    if path.is_dir():
        raise UserError(f"output_path={name}: a folder. Name a file in it: {path / 'completions.jsonl'}.")
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"output_path={name}: cannot be written to. Name another file.")
        return
    if prompts_path and path.exists() and path.samefile(Path(prompts_path).expanduser()):
        raise UserError(f"output_path={name}: the file that prompts_path names. Name another, to keep the prompts.")
    if not path.parent.is_dir():
        raise UserError(f"output_path={name}: no folder {path.parent}. Make it, or name another file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"output_path={name}: {path.parent} cannot be written to. Name a file in another folder.")
    partial = _partial(path)
    if os.path.lexists(partial):
        raise UserError(
            f"output_path={name}: {partial} is there, from a run that was stopped or is still under way. "
            "Move or remove it, or name another file."
        )


def is_standard(name: str) -> bool:
    """Whether lines for ``name`` go to standard output: it is empty, or names what that is open on.

    A file that the shell appends to is then appended to, whether it is named `/dev/stdout` or by its own name.
    """
    try:
        return not name or os.path.samestat(Path(name).expanduser().stat(), os.fstat(1))
    except OSError:  # nothing is there, or standard output is closed
        return False


@contextlib.contextmanager
def lines(name: str, console: Console) -> Iterator[Put]:
    """Give a function that writes an object as a line to the file ``name``, or to standard output where that is meant.

    The file is written as ``name.partial`` and takes its place at the end. A run that stops before leaves what it
    finished in that one, and says so. A symbolic link's target is written in this way; a device or a pipe is written to
    as it is. Raises RunError where the disk refuses.
    """
    path = _place(name)
    write = _stream if _is_stream(path) else _file
    with _standard_output() if is_standard(name) else write(path, console) as put:
        yield put


@contextlib.contextmanager
def until_closed() -> Iterator[None]:
    """End quietly when whoever reads standard output, `head` perhaps, has had enough."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end


def _place(name: str) -> Path:
    """Return what ``name`` stands for: of a symbolic link the target, so that the link remains."""
    path = Path(name).expanduser()
    return Path(os.path.realpath(path)) if path.is_symlink() and not _is_stream(path) else path


def _is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe, which has no content that could be whole."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def _file(path: Path, console: Console) -> Iterator[Put]:
    partial = _partial(path)

    def stopped(count: int) -> None:
        if not count:  # what says nothing is not to stand in the way of the next run
            partial.unlink()
        kept = f"{partial} has what was written so far" if count else "nothing was written"
        console.print(f"Not finished: {kept}; {path} is as it was.")

    with _written(partial, "x", stopped) as put:  # "x": another run may have begun it since it was checked
        yield put
    with disk.writing(path, "the completions", lambda: f"{partial} has them. Name another file."):
        partial.replace(path)


@contextlib.contextmanager
def _stream(path: Path, console: Console) -> Iterator[Put]:
    with _written(path, "w", lambda count: console.print(f"Not finished: {path} was sent {count} lines.")) as put:
        yield put


@contextlib.contextmanager
def _written(path: Path, mode: str, stopped: Callable[[int], None]) -> Iterator[Put]:
    """Open a file, give a function that writes a line to it, and close it when all are known to be there.

    Where they are not, ``stopped`` is told how many were written.
    """
    count = 0

    def refused() -> str:
        return f"{path} has the {count} lines before that. Make room, or name another file with output_path=...."

    with disk.writing(path, "the completions", refused):
        file = path.open(mode, encoding="utf-8")

    def put(row: dict[str, Any]) -> None:
        nonlocal count
        with disk.writing(path, "the completions", refused):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        count += 1

    try:
        yield put
    except BaseException:
        with contextlib.suppress(OSError):  # the disk refuses again what it refused before
            file.close()
        stopped(count)
        raise
    with disk.writing(path, "the completions", refused):
        if path.is_file():  # a device or a pipe has nothing to sync
            os.fsync(file.fileno())
        file.close()


@contextlib.contextmanager
def _standard_output() -> Iterator[Put]:
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"

    def put(row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(row, ensure_ascii=plain) + "\n")
        sys.stdout.flush()

    with until_closed():
        yield put

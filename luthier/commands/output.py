"""JSON lines, to standard output or into a file that is whole or not there.

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


def check(name: str) -> None:
    """Refuse an ``output_path`` that cannot be written, before anything is computed for it. Raises UserError."""
    if not name:
        return
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"output_path={name}: a folder. Name a file in it: {path / 'completions.jsonl'}.")
    if not path.parent.is_dir():
        raise UserError(f"output_path={name}: no folder {path.parent}. Make it, or name another file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"output_path={name}: {path.parent} cannot be written to. Name a file in another folder.")


@contextlib.contextmanager
def lines(name: str, console: Console) -> Iterator[Put]:
    """Give a function that writes an object as a line to the file ``name``, or to standard output where it is empty.

    The file is written as ``name.partial`` and takes its place at the end. A run that stops before leaves what it
    finished in that one, and says so. Raises RunError where the disk refuses.
    """
    with _file(Path(name).expanduser(), console) if name else _standard_output() as put:
        yield put


@contextlib.contextmanager
def until_closed() -> Iterator[None]:
    """End quietly when whoever reads standard output, `head` perhaps, has had enough."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end


@contextlib.contextmanager
def _file(path: Path, console: Console) -> Iterator[Put]:
    partial, count = path.with_name(path.name + ".partial"), 0

    def refused() -> str:
        return f"{partial} has the {count} lines before that. Make room, or name another file with output_path=...."

    with disk.writing(partial, "the completions", refused):
        file = partial.open("w", encoding="utf-8")

    def put(row: dict[str, Any]) -> None:
        nonlocal count
        with disk.writing(partial, "the completions", refused):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        count += 1

    try:
        yield put
    except BaseException:
        with contextlib.suppress(OSError):  # the disk refuses again what it refused before
            file.close()
        console.print(f"Not finished: {partial} has what was written so far; {path} is as it was.")
        raise
    with disk.writing(path, "the completions", refused):
        file.flush()
        os.fsync(file.fileno())
        file.close()
        partial.replace(path)


@contextlib.contextmanager
def _standard_output() -> Iterator[Put]:
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"

    def put(row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(row, ensure_ascii=plain) + "\n")
        sys.stdout.flush()

    with until_closed():
        yield put

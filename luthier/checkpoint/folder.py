"""A folder that is whole or not there: it is written beside its place, and moved there at the end.

Left out on purpose: what is in it (``huggingface``, ``peft``), and telling what the disk refuses (``disk``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier import remote
from luthier.checkpoint.tensors import Stored, write_safetensors

Shards = Mapping[str, Mapping[str, Stored]]


def write(folder: Path, shards: Shards, documents: Mapping[str, Any], write_more: Callable[[Path], None]) -> None:
    """Write ``folder`` of tensors by file, of ``documents`` (texts, and what becomes JSON) and ``write_more``'s files.

    Where it is part of a run in a bucket, it is copied there.

    A failure leaves the folder that was there before. The one gap is between two renames: a machine that dies just
    there leaves the old folder as ``.NAME.old``.
    """
    new = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for name, group in shards.items():
            write_safetensors(new / name, group)
        for name, content in documents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (new / name).write_text(text, encoding="utf-8")
        write_more(new)
        for path in [*new.iterdir(), new]:
            sync(path)
        _replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    remote.push(folder)


def sync(path: Path) -> None:
    """Make sure that a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)

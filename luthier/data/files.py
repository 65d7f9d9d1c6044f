"""``hf_path`` -> the splits of a dataset: data files and folders here, saved and hub datasets through ``hub``, problems
that are made by ``reasoning``.

Left out on purpose: compressed files, and datasets that are streamed.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from luthier import remote
from luthier.data import hub, reasoning
from luthier.data.rows import Chain, Rows, Selected, read_file
from luthier.errors import UserError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
Splits = Mapping[str, Callable[[], Rows]]
"""The splits of a dataset; each is opened when called."""

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files about a dataset that ``datasets`` and the hub put beside its rows."""
_PART = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def open_splits(path: str, subset: str | None = None, token: str | None = None, key: str = "hf_path") -> Splits:
    """Return the splits of the dataset at ``path``. Raises UserError where there is none, naming ``key``.

    Single files and globs make one split, ``train``; a folder's files are told apart by words such as ``train`` and
    ``test`` in their names, and where there are Parquet files among them, others are taken to be about the dataset.
    """
    if path.startswith(reasoning.PREFIX):
        return reasoning.splits(path, key)
    if remote.is_url(path):
        path = _brought(path, key)
    local = Path(path).expanduser()
    if glob.has_magic(path) and not local.exists():
        found = sorted(Path(name) for name in glob.glob(str(local), recursive=True) if name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"{key}={path}: no {', '.join(SUFFIXES)} file matches.")
        return {"train": _opener(found, path)}
    if local.is_file():
        if local.suffix not in SUFFIXES:
            raise UserError(f"{key}={path}: cannot read `{local.suffix}` files. Give one of {', '.join(SUFFIXES)}.")
        return {"train": _opener([local], path)}
    if local.is_dir():
        return _folder(local, path, key)
    if path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{key}={path}: no such file or folder.{_sibling(local)}")
    return hub.hub_splits(path, subset, token, key)


def _brought(url: str, key: str) -> str:
    """Return the path of the local copy of a file, a folder or a glob in a bucket."""
    folder, names = url, ""
    while glob.has_magic(folder):
        folder, _, last = folder.rpartition("/")
        names = f"/{last}{names}"
    deep = names.count("/") != 1 or "**" in names
    return f"{remote.fetch(folder, key, [f'*{Path(names).name}'], deep=deep)}{names}"


def open_split(splits: Splits, split: str, source: str, key: str) -> Rows:
    """Return the rows of ``split``: a name, a slice such as ``train[:90%]`` or ``train[10:20]``, or several by ``+``.

    Raises UserError for a split that is not there, which names those that are, for a slice that cannot be read, and
    for one without rows.
    """
    rows = [_slice(splits, part.strip(), source, key) for part in split.split("+")]
    chosen = rows[0] if len(rows) == 1 else Chain(rows, source)
    if not len(chosen):
        raise UserError(f"{key}={split}: no rows in {source}.")
    return chosen


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return (training rows, held-out rows): a share drawn by the seed, at least one row on either side."""
    if len(rows) < 2:
        raise UserError(f"eval_fraction={fraction}: {rows.source} has {len(rows)} row, too few to hold any out.")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    order_C = np.random.default_rng(seed).permutation(len(rows))
    return Selected(rows, np.sort(order_C[count:])), Selected(rows, np.sort(order_C[:count]))


def _folder(folder: Path, path: str, key: str) -> Splits:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in files if file.name not in _METADATA]
    files = [file for file in files if file.suffix == ".parquet"] or files
    if not files and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        return hub.saved_splits(folder, key)
    named: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder).with_suffix("")).lower())
        named.setdefault(next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), ""), []).append(file)
    if not named:
        raise UserError(f"{key}={path}: the folder holds neither a saved dataset nor {', '.join(SUFFIXES)} files.")
    unnamed = named.pop("", [])
    if unnamed:
        named["train"] = sorted(named.get("train", []) + unnamed)
    return {split: _opener(paths, path) for split, paths in named.items()}


def _opener(paths: Sequence[Path], source: str) -> Callable[[], Rows]:
    def opened() -> Rows:
        parts = [read_file(path) for path in paths]
        return parts[0] if len(parts) == 1 else Chain(parts, source)

    return opened


def _slice(splits: Splits, part: str, source: str, key: str) -> Rows:
    match = _PART.fullmatch(part)
    if match is None:
        raise UserError(f"{key}={part}: not a split. Give a name, or a slice such as `train[:90%]`.")
    name = match["name"]
    if name not in splits:
        hint = did_you_mean(name, list(splits))
        raise UserError(f"{key}={part}: no split `{name}` in {source}, which has {', '.join(splits)}.{hint}")
    rows = splits[name]()
    if part == name:
        return rows
    for side in ("start", "stop"):
        if (match[side] or "").endswith("%") and abs(int(match[side][:-1])) > 100:
            raise UserError(f"{key}={part}: {match[side]} of the rows. Give a share from 0% to 100%.")
    start, stop = (_bound(match[side], len(rows)) for side in ("start", "stop"))
    return Selected(rows, np.arange(len(rows))[start:stop])


def _bound(text: str | None, length: int) -> int | None:
    if text is None:
        return None
    return round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)


def _sibling(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names)

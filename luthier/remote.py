"""Buckets: ``gs://`` and ``s3://`` in place of a local path, through fsspec's file systems.

What is read is copied to this machine first, into ``~/.cache/luthier``, and copied again only where it has changed.
What is written is written here and copied out: ``Mirror`` keeps a folder and its copy in a bucket alike, so that a
machine which has nothing of a run can go on with it.

Left out on purpose: credentials, which the file systems find where their makers say (``aws configure``, ``gcloud
auth``, a machine's own role, ``AWS_ENDPOINT_URL`` for another server of the protocol), and other protocols.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from luthier.errors import RunError, UserError

CACHE = Path("~/.cache/luthier")
PERIOD = 30.0
"""Seconds between two looks at what a mirror has to copy."""
MARK = ".remote.json"
WHOLE = "_UPLOADED.json"
"""Lies in a checkpoint's copy once all of it is there, and lists it."""
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_ELSEWHERE = ("model", "adapter", "profile")  # copied out, never in: a run does not read them
_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"}


def is_url(path: str) -> bool:
    """Say whether ``path`` names something in a bucket, or tries to."""
    return re.match(r"\w+://", path) is not None


def local(url: str, room: str) -> Path:
    """Return where this machine keeps its copy of ``url``, in a folder of the cache for each use."""
    scheme, _, rest = url.partition("://")
    return CACHE.expanduser() / room / scheme / rest.strip("/")


def fetch(url: str, key: str, patterns: Sequence[str] = ("*",), *, deep: bool = False) -> Path:
    """Return the local copy of a file or folder in a bucket; of a folder, the files whose names match ``patterns``.

    With ``deep`` those in its folders too. Raises UserError, of ``key``, where there is nothing or no way to it.
    """
    from filelock import FileLock

    files, root = _open(url, key)
    place = local(url, "fetched")

    def asked(name: str) -> bool:
        return (deep or "/" not in name) and (not name or any(fnmatch(name, each) for each in patterns))

    with refusals(f"{key}={url}", UserError):
        found = _listed(files, root, maxdepth=None if deep else 1)
    wanted = {name: _version(entry) for name, entry in found.items() if asked(name)}
    if not wanted:
        kinds = ", ".join(patterns)
        raise UserError(f"{key}={url}: nothing is there, or no file of a kind that is read ({kinds}). Check the path.")
    record = local(f"{url.rstrip('/')}.json", "records")
    record.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{record}.lock"), refusals(f"{key}={url}", UserError):  # of several processes, one copies
        _copy_in(files, root, place, record, wanted, asked)
    return place


def holds(url: str, name: str, key: str) -> bool:
    """Say whether a folder in a bucket has the file ``name``. Raises UserError where it cannot be seen."""
    files, path = _open(url, key)
    with refusals(f"{key}={url}", UserError):
        return bool(files.exists(f"{path}/{name}"))


def move(old: str, new: str) -> None:
    """Give a folder in a bucket another name, by copying its files. Raises RunError where the bucket refuses."""
    files, root = _open(old, "base_output_directory")
    with refusals(f"{old} could not be moved to {new}", RunError):
        files.invalidate_cache()
        names, there = files.find(root), new.partition("://")[2]
        files.copy(names, [there + name[len(root) :] for name in names])
        files.rm(names)


class Mirror:
    """A run's folder here, and its copy at ``url``.

    As a context it copies what has changed out every ``PERIOD`` seconds, and at its end: so much is lost at most with
    this machine. A copy that fails is told to ``warn`` and made up for later; the last one raises.
    """

    def __init__(self, folder: Path, url: str, warn: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.url, self._warn = folder, url, warn
        mark = folder / MARK
        self._sent: dict[str, Any] = json.loads(mark.read_text())["sent"] if mark.is_file() else {}
        self._done, self._thread = threading.Event(), threading.Thread(target=self._work, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._done.set()
        self._thread.join()
        try:
            self.push()
        except RunError as failed:
            if not isinstance(error, Exception):
                raise
            error.add_note(str(failed))  # what ended the run comes first

    def pull(self) -> bool:
        """Copy in what this machine has not, and return whether a run has made progress there.

        Where both have changed, those are taken that have the newer checkpoint. Raises UserError where the bucket
        refuses.
        """
        files, root = _open(self.url, "base_output_directory")
        with refusals(f"base_output_directory: {self.url}", UserError):
            there = _listed(files, root)
            if self._sent and not there:
                raise UserError(
                    f"{self.url}: the run is gone from there, and {self.folder} still holds a copy. Remove that folder "
                    "to begin again, or copy it back to go on."
                )
            steps = _whole_steps(files, root, there)
            behind = max(steps, default=-1) > max(_steps(self.folder / "checkpoints"), default=-1)
            for step in steps:
                self._pull_step(files, root, step, steps[step])
            self._pull_rest(files, root, there, behind)
            if there:
                self._remember()
        return any(name.split("/")[0] in ("model", "adapter", "checkpoints") for name in there)

    def push(self) -> None:
        """Copy out what has changed here. Raises RunError where the bucket refuses; nothing is lost here."""
        files, root = _open(self.url, "base_output_directory")
        # Path.rglob would raise where a folder goes while it is read.
        found = (Path(parent, name) for parent, _, names in os.walk(self.folder) for name in names)
        here = {str(path.relative_to(self.folder)): path for path in found if _goes(self.folder, path)}
        stats = {name: _stat(path) for name, path in here.items()}
        changed = {name: stat for name, stat in stats.items() if stat and self._sent.get(name) != stat}
        with refusals(f"{self.url}: the run could not be copied there from {self.folder}", RunError):
            if changed:
                files.put([str(here[name]) for name in changed], [f"{root}/{name}" for name in changed])
            self._sent |= changed
            for step in {_step(name) for name in changed} - {""}:
                sizes = {name.split("/", 2)[2]: self._sent[name][0] for name in self._sent if _step(name) == step}
                files.pipe_file(f"{root}/checkpoints/{step}/{WHOLE}", json.dumps(sizes).encode())
            self._drop(files, root, {name for name in self._sent if not stats.get(name)})
            self._remember()

    def _work(self) -> None:
        while not self._done.wait(PERIOD):
            try:
                self.push()
            except RunError as failed:
                self._warn(f"{failed} It is tried again.")

    def _pull_step(self, files: Any, root: str, step: int, sizes: dict[str, int]) -> None:
        place = self.folder / "checkpoints" / str(step)
        if place.exists():
            return
        draft = place.with_name(f".{step}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        names = list(sizes)
        files.get([f"{root}/checkpoints/{step}/{name}" for name in names], [str(draft / name) for name in names])
        draft.rename(place)
        self._sent |= {f"checkpoints/{step}/{name}": _stat(place / name) for name in names}

    def _pull_rest(self, files: Any, root: str, there: dict[str, Any], behind: bool) -> None:
        """Copy in files that are no checkpoint's, but those that are not sent yet unless this machine is ``behind``."""
        for name, entry in there.items():
            path = self.folder / name
            if name.split("/")[0] in (*_ELSEWHERE, "checkpoints"):
                continue
            stat = _stat(path)
            if stat is None or (stat[0] != entry["size"] and (behind or self._sent.get(name) == stat)):
                path.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{root}/{name}", str(path))
                self._sent[name] = _stat(path)

    def _drop(self, files: Any, root: str, gone: set[str]) -> None:
        """Remove what is here no more; of a checkpoint all, as soon as a part of it goes."""
        steps = {_step(name) for name in gone} - {""}
        for step in steps:
            with contextlib.suppress(FileNotFoundError):
                files.rm(f"{root}/checkpoints/{step}", recursive=True)
        if loose := [name for name in gone if not _step(name)]:
            with contextlib.suppress(FileNotFoundError):
                files.rm([f"{root}/{name}" for name in loose])
        self._sent = {name: stat for name, stat in self._sent.items() if name not in gone and _step(name) not in steps}

    def _remember(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{MARK}.draft"
        draft.write_text(json.dumps({"url": self.url, "sent": self._sent}))
        draft.replace(self.folder / MARK)


def push(path: Path) -> None:
    """Copy out the mirrored folder that ``path`` lies in, if any. Raises RunError as ``Mirror.push`` does."""
    for folder in path.absolute().parents:
        if (folder / MARK).is_file():
            Mirror(folder, json.loads((folder / MARK).read_text())["url"]).push()
            return


@contextlib.contextmanager
def refusals(what: str, kind: type[UserError] | type[RunError]) -> Iterator[None]:
    """Turn a bucket's refusals into errors of ``kind`` which say what was wanted, and what to look at."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _LIBRARIES:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise kind(f"{what}: {reason}. Check the bucket's name, the network and your credentials.") from error


def _open(url: str, key: str) -> tuple[Any, str]:
    """Return the file system of ``url`` and the path in it."""
    scheme, _, rest = url.partition("://")
    if scheme not in _EXTRAS:
        raise UserError(f"{key}={url}: `{scheme}://` is not known. Give gs://, s3:// or a local path.")
    if not rest.strip("/"):
        raise UserError(f"{key}={url}: names no bucket. Give {scheme}://BUCKET/PATH.")
    import fsspec

    try:
        with refusals(f"{key}={url}", UserError):
            files, path = fsspec.url_to_fs(url.rstrip("/"))
    except ImportError as error:
        extra = _EXTRAS[scheme]
        raise UserError(
            f"{key}={url}: needs the package {error.name}. Install it: pip install 'luthier[{extra}]'."
        ) from None
    return files, path


def _listed(files: Any, root: str, maxdepth: int | None = None) -> dict[str, Any]:
    """Return {name below ``root``: entry} of the files there, and of one file its own under the name ``""``."""
    files.invalidate_cache()
    found = files.find(root, maxdepth=maxdepth, detail=True)
    # What ends in a slash is the empty file that consoles make to show a folder.
    return {name[len(root) :].strip("/"): entry for name, entry in found.items() if not name.endswith("/")}


def _copy_in(
    files: Any, root: str, place: Path, record: Path, wanted: dict[str, Any], asked: Callable[[str], bool]
) -> None:
    """Make the copy at ``place`` what is ``wanted``: {name: its version}, or one file under the name ``""``.

    ``record`` says what was copied before. Of that, what is not ``asked`` for was for another use, and stays.
    """
    before = json.loads(record.read_text()) if record.is_file() else {}
    others = {name: version for name, version in before.items() if not asked(name)}
    changed = [name for name in wanted if before.get(name) != wanted[name] or not (place / name).exists()]
    for name in before.keys() - wanted.keys() - others.keys():
        (place / name).unlink(missing_ok=True)
    record.unlink(missing_ok=True)  # until all is there
    paths = [place / name if name else place for name in changed]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    if changed:
        files.get([f"{root}/{name}" if name else root for name in changed], [str(path) for path in paths])
    record.write_text(json.dumps(others | wanted))


def _version(entry: dict[str, Any]) -> list[Any]:
    """Return what changes when a file in a bucket does."""
    return [entry["size"], str(entry.get("ETag") or entry.get("etag") or entry.get("mtime"))]


def _whole_steps(files: Any, root: str, there: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Return {step: {file: size}} of the checkpoints whose copies are whole."""
    found = {}
    for name in there:
        step = _step(name)
        if step and name.endswith(f"/{WHOLE}"):
            sizes = json.loads(files.cat_file(f"{root}/{name}"))
            if all(there.get(f"checkpoints/{step}/{part}", {}).get("size") == size for part, size in sizes.items()):
                found[int(step)] = sizes
    return found


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def _step(name: str) -> str:
    """Return the step whose checkpoint a file belongs to, or ""."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "checkpoints" and parts[1].isdigit() else ""


def _goes(folder: Path, path: Path) -> bool:
    """Whether a file is to be copied: no draft, nothing that is being written, and no damaged checkpoint."""
    parts = path.relative_to(folder).parts
    drafts = any(part.startswith(".") or part.endswith(".damaged") or "-tmp" in part for part in parts)
    return not drafts and path.is_file() and (parts[0] != "checkpoints" or bool(_step("/".join(parts))))


def _stat(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]

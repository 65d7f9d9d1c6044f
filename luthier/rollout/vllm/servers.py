"""vLLM servers as child processes: started at once, started again when they fail, and ended with this process.

Each has a session of its own, out of reach of a terminal's Ctrl-C, and a guard that ends it, and all that it started,
once this process is gone, however that went (``worker_guard``). What it prints goes to a file.

Left out on purpose: waiting until they answer, which whoever asks them does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from luthier.checkpoint.source import Source
from luthier.errors import UserError
from luthier.rollout.vllm import command
from luthier.rollout.vllm.command import Wanted
from luthier.rollout.vllm.devices import Share

RESTARTS, WITHIN = 3, 3600.0
"""How often a server is started again, in how many seconds."""
KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that holds the servers' key, for vLLM too."""
HERE = "127.0.0.1"

_PROGRAM = """
import json, os, sys
told = json.loads(sys.argv[1])
sys.path[:] = told["path"]
from luthier.rollout import worker_guard
worker_guard.start()
os.execv(told["command"][0], told["command"])
"""
PATIENCE = 15.0
"""Seconds that servers have to end by themselves: they then take their shared memory with them."""
_SHOWN = 6
"""Lines of a log that are shown."""
_PREFIX = re.compile(r"^(\(.*?\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[.*?\] ?)?")
_RAISED = re.compile(r"^\s*([\w.]*(Error|Exception)\b.*|usage: .*|.*: error: .*)$")


class Place(NamedTuple):
    """Where a server listens, what it has, where it writes, and whether that is kept when it has ended."""

    host: str
    port: int
    share: Share
    log: Path | None
    kept: bool = True

    @property
    def url(self) -> str:
        """Its address, as seen from here."""
        return f"http://{HERE if self.host in ('0.0.0.0', '::') else self.host}:{self.port}"


class Process:
    """A server's process, from its start to its end."""

    def __init__(self, arguments: Sequence[str], place: Place) -> None:
        """Start it. Without a log it prints where this process does."""
        told = json.dumps({"path": sys.path, "command": arguments})
        with contextlib.ExitStack() as stack:
            output: IO[Any] | None = None
            self._log, self._kept, self._begins = place.log, place.kept, 0
            if place.log is not None:
                output = stack.enter_context(place.log.open("ab"))
                self._begins = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, told],
                stdin=subprocess.PIPE,  # nothing is written to it: the guard waits for its end
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=command.environment(place.share),
                start_new_session=True,
            )

    @property
    def number(self) -> int:
        """The process's id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Return its exit code, None where it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self, patience: float = 0.0) -> None:
        """Give it some seconds to end, and then end it and whatever it has started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter from macOS, for a dead one
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def said(self) -> str:
        """Return how it ended, if it did, and what its log says of why."""
        code, found = self.ended(), []
        if self._log is not None:
            with self._log.open("rb") as file:
                file.seek(self._begins)
                found = causes(file.read().decode(errors="replace"))
        ended = "" if code is None else f"it ended {how(code)}. "
        where = f"Its log is {self._log}" if self._log is not None and self._kept else "Its log says" if found else ""
        return f"{ended}{where}" + "".join(f"\n  {line}" for line in found)


class Children:
    """Servers of a model on this machine: ``fleet.Servers``. They start at once; ``close`` ends them.

    ``logs`` is the folder of their logs, None for a temporary one that goes with them. Methods may be called by any
    thread.
    """

    def __init__(
        self, wanted: Wanted, source: Source, words: Any, shares: Sequence[Share], logs: Path | None = None
    ) -> None:
        """Start a server for each of ``shares``. Raises UserError where vLLM is not there."""
        self.api_key = os.environ.get(KEY_VARIABLE, "")
        self._room = tempfile.TemporaryDirectory(prefix="luthier-vllm-")
        self._lock, self._closed = threading.Lock(), False
        self._running: dict[str, Process] = {}
        try:
            self._wanted = wanted
            self._model = command.folder(Path(self._room.name) / "model", source, words, wanted.dtype)
            kept, logs = logs is not None, logs or Path(self._room.name)
            logs.mkdir(parents=True, exist_ok=True)
            places = [
                Place(HERE, port, share, logs / f"server-{number}.log", kept)
                for number, (port, share) in enumerate(zip(_free_ports(len(shares)), shares, strict=True))
            ]
            self._places = {place.url: place for place in places}
            self._restarts: dict[str, deque[float]] = {url: deque() for url in self._places}
            for url in self._places:
                self._start(url)
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> Sequence[str]:
        """Where they are."""
        return list(self._places)

    def running(self, url: str) -> bool:
        """Say whether a server's process runs."""
        return self._running[url].ended() is None

    def restart(self, url: str) -> bool:
        """End what there is of a server and start it anew; say whether it was, or has failed too often for that."""
        with self._lock:
            if self._closed or not may_restart(self._restarts[url]):
                return False
            self._running[url].end()
            self._start(url)
        return True

    def failure(self, url: str) -> str:
        """Return what a server's log says last."""
        return self._running[url].said()

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for process in self._running.values():
                process.terminate()
            deadline = time.monotonic() + PATIENCE
            for process in self._running.values():
                process.end(max(0.0, deadline - time.monotonic()))
        self._room.cleanup()

    def _start(self, url: str) -> None:
        place = self._places[url]
        arguments = command.command(self._wanted, self._model, place.host, place.port, place.share)
        self._running[url] = Process(arguments, place)


def may_restart(before: deque[float]) -> bool:
    """Say whether a server may be started again that was so at the times ``before``, and if so add this one."""
    now = time.monotonic()
    while before and now - before[0] > WITHIN:
        before.popleft()
    if len(before) == RESTARTS:
        return False
    before.append(now)
    return True


def check_port(host: str, port: int) -> None:
    """Raise UserError where a server cannot listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"host={host} port={port}: {reason}. Give an address of this machine and a free port."
        ) from None


def causes(log: str) -> list[str]:
    """Return the lines of a server's log that say why it ended: the first and the last errors, else its end."""
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    raised = list(dict.fromkeys(line.strip() for line in lines if _RAISED.match(line)))
    if not raised:
        return [line for line in lines if line][-_SHOWN:]
    return raised if len(raised) <= _SHOWN else [*raised[: _SHOWN - 2], *raised[-2:]]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:  # all are held until the last is found, so that no two are the same
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HERE, 0))
        return [each.getsockname()[1] for each in sockets]


def how(code: int) -> str:
    """Return how a process with this exit code ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    hint = " (the machine may be out of memory)" if code == -signal.SIGKILL else ""
    return f"by {signal.Signals(-code).name}{hint}"

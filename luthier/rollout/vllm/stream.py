"""Tensors from a trainer to the workers of vLLM servers, over sockets and, on the trainer's host, shared memory.

The other end is ``extension/luthier_vllm.py``. A worker is given an ``Order`` by its server and connects to us. Both
sides speak JSON, each message after its length in four bytes:

- the worker: ``{"token", "server", "shared"}``: which order it has, and whether it sees our shared memory;
- for each tensor we: ``{"name", "dtype", "shape", "bytes"}``, its bytes in parts of at most ``SLOT`` bytes, and
  ``{"crc"}``, the CRC-32 of all of them. A part follows as it is, or as ``{"slot"}`` where it lies in shared memory,
  and the worker says ``{"taken"}`` when it has a copy of it;
- we: ``{"end": names}``, and the worker, when all is loaded, what came of it: ``{"error"}`` or something else.

Left out on purpose: encryption. Whoever can read the network between trainer and servers can read the weights, and a
token of one sync, which the order brings, keeps others from taking a worker's place.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import select
import selectors
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SLOT = 8 << 20
"""Bytes of a part. All slots together are below the 64 MiB of shared memory that a container has."""
SLOTS = 4
_TOKEN_BYTES = 16
_LONGEST = 1 << 20
"""Bytes of a worker's message."""
_SHARED = Path("/dev/shm")
_START = 4096
"""Where the slots begin: before them stands the token, by which a worker knows that the memory is ours."""


@dataclass(frozen=True)
class Order:
    """What a worker has to know: where we listen, and where our shared memory is, "" for nowhere.

    ``token`` is that of the sync, ``server`` the number of the worker's server in it, ``seconds`` how long to wait for
    anything. ``adapter`` is the name of the adapter that is sent, ``folder`` that of the folder it is for.
    """

    host: str
    port: int
    token: str
    server: int
    seconds: float
    slots: str
    adapter: str = ""
    folder: str = ""
    slots_start: int = _START
    slot_bytes: int = field(default_factory=lambda: SLOT)

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))


class Lost(Exception):
    """A worker cannot be told anything any more; ``late`` where it just says nothing."""

    def __init__(self, what: str, *, late: bool = False) -> None:
        """Take what happened."""
        super().__init__(what)
        self.late = late


class Worker:
    """The connection to one worker of the server number ``server``."""

    def __init__(self, connection: socket.socket, token: str, seconds: float) -> None:
        """Hear who it is. Raises Lost where it is nobody that has the ``token``."""
        connection.settimeout(seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._seconds = connection, seconds
        self._given = self._taken = 0
        try:
            hello = self._hear()
            if not secrets.compare_digest(str(hello.get("token")), token):
                raise Lost("somebody without the token connected")
            self.server, self.shared = int(hello["server"]), bool(hello["shared"])
        except Lost:
            connection.close()
            raise

    def tell(self, message: dict[str, Any]) -> None:
        """Say something."""
        text = json.dumps(message).encode()
        self._send(len(text).to_bytes(4, "big") + text)

    def give(self, part: memoryview, slot: int) -> None:
        """Send a part of a tensor, of which there is a copy in ``slot`` if the worker sees that."""
        if self.shared:
            self.tell({"slot": slot})
            self._given += 1
        else:
            self._send(part)

    def settle(self, outstanding: int) -> None:
        """Wait until all but the last ``outstanding`` parts in slots were taken."""
        while self._given - self._taken > outstanding:
            self._take()

    def look(self) -> None:
        """Raise Lost if it has said that something is wrong, without waiting for that."""
        there = select.poll()
        there.register(self._socket, select.POLLIN)
        while there.poll(0):
            self._take()

    def result(self) -> dict[str, Any]:
        """Return what the worker says when it has everything. Raises Lost with its reason where something was wrong."""
        self.settle(0)
        message = self._hear()
        if "error" in message:
            raise Lost(message["error"])
        return message

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def _take(self) -> None:
        message = self._hear()
        if "error" in message:
            raise Lost(message["error"])
        self._taken += 1

    def _send(self, data: Any) -> None:
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise Lost(f"a worker took nothing for {self._seconds:g} s", late=True) from None
        except OSError as error:
            raise Lost(self._last_words() or f"a worker could not be sent anything: {error!r}") from None

    def _last_words(self) -> str:
        """Return what a worker said that has closed the connection."""
        try:
            while True:
                message = self._hear()
                if "error" in message:
                    return message["error"]
        except Lost:
            return ""

    def _hear(self) -> dict[str, Any]:
        try:
            return json.loads(self._receive(int.from_bytes(self._receive(4), "big")))
        except TimeoutError:
            raise Lost(f"a worker said nothing for {self._seconds:g} s", late=True) from None
        except (OSError, ValueError) as error:
            raise Lost(f"a worker broke off: {error}") from None

    def _receive(self, size: int) -> bytes:
        if size > _LONGEST:
            raise ValueError(f"a message of {size} bytes")
        parts = []
        while size:
            part = self._socket.recv(min(size, 1 << 16))
            if not part:
                raise ConnectionError("it closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Listening:
    """Where workers connect: one socket for each of our addresses that some server sees us at."""

    def __init__(self) -> None:
        """Listen to nobody yet."""
        self._sockets: dict[str, socket.socket] = {}

    def beside(self, host: str, port: int, seconds: float) -> tuple[str, int]:
        """Return the address and port at which the server at ``host`` and ``port`` can reach us. Raises OSError."""
        with socket.create_connection((host, port), seconds) as there:
            ours, family = there.getsockname()[0], there.family
        if ours not in self._sockets:
            self._sockets[ours] = socket.create_server((ours, 0), family=family)
        return ours, self._sockets[ours].getsockname()[1]

    def accept(self, token: str, seconds: float, take: Callable[[Worker], None], enough: Callable[[], bool]) -> None:
        """Hand each worker that connects to ``take``, until it is ``enough`` or ``seconds`` are over."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            for each in self._sockets.values():
                ready.register(each, selectors.EVENT_READ, each)
            while time.monotonic() < end and not enough():
                for key, _ in ready.select(0.2):
                    try:
                        take(Worker(key.data.accept()[0], token, seconds))
                    except Lost:
                        continue  # whoever it was; the worker that should be there is missed when time is over

    def close(self) -> None:
        """Listen no more."""
        for each in self._sockets.values():
            each.close()


class Slots:
    """Shared memory of ``SLOTS`` parts; ``path`` is "" where this system has none, or too little."""

    def __init__(self, token: str) -> None:
        """Make it, readable by this user alone, with ``token`` at its start."""
        self.path, self._memory = "", None
        if not _SHARED.is_dir():
            return
        handle, path = tempfile.mkstemp(prefix="luthier-", dir=_SHARED)
        with os.fdopen(handle, "r+b"):
            try:
                os.posix_fallocate(handle, 0, _START + SLOTS * SLOT)  # else writing where no room is would kill us
            except OSError:
                os.unlink(path)
                return
            self.path, self._memory = path, mmap.mmap(handle, 0)
        self._memory[: len(token)] = token.encode()

    def write(self, slot: int, part: memoryview) -> None:
        """Copy a part into a slot."""
        if self._memory is not None:
            start = _START + slot * SLOT
            self._memory[start : start + len(part)] = part

    def close(self) -> None:
        """Give it back; workers that have it open keep what they see."""
        if self._memory is not None:
            self._memory.close()
            Path(self.path).unlink(missing_ok=True)


def new_token() -> str:
    """Return a token that nobody guesses."""
    return secrets.token_hex(_TOKEN_BYTES)


def send(
    name: str,
    array: np.ndarray,
    workers: Sequence[Worker],
    slots: Slots,
    part: int,
    lose: Callable[[Worker, Lost], None],
) -> int:
    """Send a tensor to workers, ``part`` being the number of parts sent before; return that number after it.

    Where a worker is lost, ``lose`` is told and the others go on.
    """
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    well = list(workers)

    def each(act: Callable[[Worker], None], among: Callable[[Worker], bool] = lambda worker: True) -> None:
        for worker in [one for one in well if among(one)]:
            try:
                act(worker)
            except Lost as lost:
                well.remove(worker)
                lose(worker, lost)

    head = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "bytes": len(raw)}
    each(lambda worker: worker.tell(head))
    crc = 0
    for start in range(0, len(raw), SLOT):
        values, slot = raw[start : start + SLOT], part % SLOTS
        if any(worker.shared for worker in well):
            each(lambda worker: worker.settle(SLOTS - 1), lambda worker: worker.shared)
            slots.write(slot, values)
        crc, part = zlib.crc32(values, crc), part + 1
        each(lambda worker, values=values, slot=slot: worker.give(values, slot))
    each(lambda worker: worker.tell({"crc": crc}))
    each(Worker.look)
    return part

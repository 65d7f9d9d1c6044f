"""Calls of somebody's functions beside one's own work: in threads, so many at a time, so long each.

Of several processes the first alone calls them where they are ``shared``, and all hear what it heard.

A call that is not back in time is given up; its thread cannot be ended, but keeps neither the caller nor the process.

Left out on purpose: processes. What is called here waits for others more than it computes.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from luthier import processes
from luthier.data import functions


class Outcome(NamedTuple):
    """What a call gave: a value, or in words the exception that it raised."""

    value: Any
    error: str | None = None


class Calls:
    """Calls under way, at most ``workers`` at a time, of ``seconds`` each; every one has a key of its own."""

    def __init__(self, workers: int, seconds: float, *, shared: bool = False) -> None:
        self._workers, self._seconds = workers, seconds
        self._shared = shared and processes.several()
        self._waiting: deque[tuple[Any, Callable[[], Any]]] = deque()
        self._deadlines: dict[Any, float] = {}
        self._back: queue.SimpleQueue[tuple[Any, Outcome]] = queue.SimpleQueue()
        self._done: dict[Any, Outcome] = {}

    def submit(self, key: Any, function: Callable[[], Any], *, here: bool) -> None:
        """Call the function: ``here`` and now, or in a thread as soon as one is free."""
        if self._shared and not processes.is_first():
            return
        if here:
            self._done[key] = self._call(function)
        else:
            self._waiting.append((key, function))
            self._start()

    def collect(self, wait: bool) -> list[tuple[Any, Outcome]]:
        """Return what is done, in the order of the keys; with ``wait`` and none done yet, wait for the first."""
        return processes.by_first(lambda: self._collect(wait)) if self._shared else self._collect(wait)

    def _collect(self, wait: bool) -> list[tuple[Any, Outcome]]:
        while True:
            self._take_back(block=wait and not self._done)
            self._start()
            if self._done or not wait or not self._deadlines:
                break
        found = sorted(self._done.items(), key=lambda item: item[0])
        self._done = {}
        return found

    def _start(self) -> None:
        while self._waiting and len(self._deadlines) < self._workers:
            key, function = self._waiting.popleft()
            self._deadlines[key] = time.monotonic() + self._seconds
            threading.Thread(target=self._run, args=(key, function), daemon=True).start()

    def _run(self, key: Any, function: Callable[[], Any]) -> None:
        self._back.put((key, self._call(function)))

    def _call(self, function: Callable[[], Any]) -> Outcome:
        try:
            value = function()
            if self._shared:
                pickle.dumps(value)  # what cannot be told to the other processes is its mistake, too
            return Outcome(value)
        except BaseException as error:
            # Whatever a stranger's function raises is what it gives, `sys.exit` in a thread of its own included.
            if isinstance(error, KeyboardInterrupt):
                raise
            return Outcome(None, described(error))

    def _take_back(self, block: bool) -> None:
        """Move what has come back, or is overdue, to what is done; with ``block`` wait until something may have."""
        first = min(self._deadlines.values(), default=0.0)
        with contextlib.suppress(queue.Empty):
            if block and self._deadlines:
                self._receive(self._back.get(timeout=max(0.0, first - time.monotonic())))
            while True:
                self._receive(self._back.get_nowait())
        now = time.monotonic()
        for key in [key for key, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[key]
            self._done[key] = Outcome(None, described(TimeoutError(f"not back after {self._seconds:g} seconds")))

    def _receive(self, item: tuple[Any, Outcome]) -> None:
        key, outcome = item
        if self._deadlines.pop(key, None) is not None:  # else it was given up
            self._done[key] = outcome


def described(error: BaseException) -> str:
    """Return an exception in words, with the line of the user's code that it came from."""
    return f"{type(error).__name__}: {error}.{functions.line_of(error)}"

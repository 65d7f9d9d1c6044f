"""Reward functions in processes of their own: several at a time, each call with a limit of time.

Whatever a function does, hang, raise, end its process, costs its rewards of the group that it was called for, and is
a ``Failure``; it never costs another function's rewards, or the run. Its process and all that it started are ended by
SIGKILL and another takes its place, so Python code, C code and processes that ignore signals end alike.

A thread for each process hands it one call after the other, from one queue. Results do not depend on who was first.

Left out on purpose: calling a function again that failed, since most would fail again.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier import processes
from luthier.errors import UserError
from luthier.rollout import reward
from luthier.rollout.failures import Failure
from luthier.rollout.reward import Group
from luthier.rollout.worker import Call, Loaded, Refused
from luthier.rollout.worker_process import Ended, WorkerProcess

MOST_WORKERS = 8
_CLOSING_SECONDS = 10
Column = tuple[list[float], Failure | None]
"""What a function gives to a group: a reward for each completion, and how it failed."""


@dataclass(frozen=True)
class Scored:
    """What F functions gave to the G completions of a group, float64, NaN for no reward, and what failed."""

    rewards_GF: np.ndarray
    failures: tuple[Failure, ...]


class Pending:
    """The rewards of a group, which are being computed."""

    def __init__(self, count: int, columns: Sequence[Future[Column]]):
        self._count, self._columns = count, columns

    def done(self) -> bool:
        """Say whether they are there."""
        return all(column.done() for column in self._columns)

    def result(self) -> Scored:
        """Wait for them, in the first process alone.

        Raises concurrent.futures.CancelledError where the ``Scorers`` were closed before.
        """
        columns = [column.result() for column in self._columns]
        rewards_FG = np.array([rewards for rewards, _ in columns], np.float64).reshape(len(columns), self._count)
        return Scored(rewards_FG.T, tuple(failure for _, failure in columns if failure is not None))


class Scorers:
    """Processes that call reward functions on groups, until it is closed; a context manager.

    ``paths`` and ``settings`` are as for ``reward.load``. Functions are loaded in the processes alone, once in each.
    ``workers`` is the number of processes, by default one for each core that this process may use, 8 at most.
    A call may take ``timeout`` seconds from its start on, loading all functions ``load_timeout``. What functions print
    is added to the file ``output``; by default it goes to this process's standard error.

    Of several processes the first alone calls functions; all make one of these, and call ``submit`` alike.

    Raises UserError where a function cannot be loaded.
    """

    def __init__(
        self,
        paths: Sequence[str],
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        workers: int = 0,
        timeout: float = 60.0,
        load_timeout: float = 600.0,
        output: Path | None = None,
    ):
        self.names = reward.names(paths)
        self._functions = tuple(paths), dict(settings or {})
        self._timeout, self._load_timeout, self._output = timeout, load_timeout, output
        self._calls: queue.SimpleQueue[tuple[Call, Future[Column]] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._running: set[WorkerProcess] = set()
        self._threads: list[threading.Thread] = []
        most = workers or min(_cores(), MOST_WORKERS)
        self._needs = processes.by_first(lambda: self._start(most)) if paths else {}

    def __enter__(self) -> Scorers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_columns(self, columns: Iterable[str], source: str) -> None:
        """Raise UserError where a function needs a column that the rows of ``source`` do not have."""
        reward.check_columns(self._needs, columns, source)

    def submit(self, group: Group) -> Pending:
        """Have each function called on a group, as soon as there is a process for it."""
        count, columns = len(group.completions), [Future() for _ in self.names]
        if not processes.is_first():
            return Pending(count, ())
        try:
            packed = pickle.dumps(group, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            # A row may hold objects of the user's own, which can do anything as they are packed.
            reason = f"could not be called: its row cannot be sent to another process: {type(error).__name__}: {error}"
            for name, column in zip(self.names, columns, strict=True):
                column.set_result(_lost(name, group.place, reason, count))
            return Pending(count, columns)
        with self._lock:
            if self._closed:
                raise RuntimeError("these Scorers are closed")
            for number, column in enumerate(columns):
                self._calls.put((Call(number, count, group.place, packed), column))
        return Pending(count, columns)

    def close(self) -> None:
        """End all processes now; what is still being computed is lost."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while asked := self._calls.get_nowait():
                    asked[1].cancel()
            for process in self._running:
                process.kill()
            for _ in self._threads:
                self._calls.put(None)
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def _start(self, workers: int) -> dict[str, tuple[str, ...]]:
        """Start the threads, the others once the first has loaded the functions, and return what these need."""
        first: Future[Loaded] = Future()
        self._start_thread(first)
        try:
            needs = first.result().needs
        except BaseException:
            self.close()
            raise
        for _ in range(workers - 1):
            self._start_thread()
        return needs

    def _start_thread(self, first: Future[Loaded] | None = None) -> None:
        # A daemon, so that Scorers that nobody closed do not keep the program from ending.
        self._threads.append(threading.Thread(target=self._tend, args=(first,), daemon=True, name="rewards"))
        self._threads[-1].start()

    def _tend(self, first: Future[Loaded] | None) -> None:
        """Keep a process running and hand it calls, in a thread, until None comes in place of a call."""
        process, reason = self._open(first)
        while (asked := self._calls.get()) is not None:
            call, column = asked
            if process is not None and process.has_ended():
                self._drop(process)
                process, reason = self._open()
            try:
                if process is None:
                    raise Ended(reason)
                column.set_result(process.ask(call, self._timeout))
            except Ended as error:
                if process is not None:
                    self._drop(process)
                if self._closed:
                    column.cancel()
                    break
                column.set_result(_lost(self.names[call.number], call.place, str(error), call.count))
                process, reason = self._open()
        if process is not None:
            self._drop(process)

    def _open(self, first: Future[Loaded] | None = None) -> tuple[WorkerProcess | None, str]:
        """Return a process that has loaded the functions, or None and why there is none, as is said of a function.

        ``first`` is told what was loaded, or the error.
        """
        process = None
        try:
            process = WorkerProcess(self._output)
            with self._lock:
                self._running.add(process)
                if self._closed:
                    process.kill()
            loaded = process.ask(self._functions, self._load_timeout)
            if isinstance(loaded, Refused):
                raise UserError(loaded.message)
            if first is not None:
                first.set_result(loaded)
            return process, ""
        except (Ended, UserError, OSError) as error:
            if process is not None:
                self._drop(process)
            if first is not None:
                said = f"{reward.KEY}={list(self.names)}: loading them {error}" if isinstance(error, Ended) else error
                first.set_exception(UserError(str(said)))
            return None, f"could not be called: loading it into another process failed: {error}"

    def _drop(self, process: WorkerProcess) -> None:
        with self._lock:
            self._running.discard(process)
        process.end()


def _lost(function: str, place: str, reason: str, count: int) -> Column:
    return [math.nan] * count, Failure(function, place, reason, count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

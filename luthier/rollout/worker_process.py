"""A process that calls reward functions, seen from the process that started it: ask it something, within a limit.

Each is a fresh interpreter rather than one of ``multiprocessing``'s: those run the program's main module again, share
locks that a process killed at the wrong moment keeps for good, and may have no children. It has a session of its own,
out of reach of a terminal's Ctrl-C, and ends with this process, however that ends (``worker_guard``).

Left out on purpose: keeping a process from using up memory, and other systems than Linux and macOS.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from luthier.rollout import reward, worker

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
descriptors = [int(argument) for argument in sys.argv[1:]]
from luthier.rollout import worker_guard
worker_guard.start(*descriptors)
from luthier.rollout.worker import serve
serve(*descriptors)
"""
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # a function that uses jax is not to take the accelerator from the training process
    "PYTHONHASHSEED": "0",  # sets have one order, so functions that depend on it agree between processes and runs
}
_STDERR = 2
_PATIENCE = 1.0
"""Seconds from the end of the pipe to the end of the process, so that its exit code is its own."""
_TRACE_SECONDS = 0.5
_TRACE_BYTES = 1 << 16


class Ended(Exception):
    """The process ended, or was ended, before it answered; the message says how, as of a function: `took longer ...`"""


class WorkerProcess:
    """A process of ``worker.serve``, to be used by one thread; ``kill`` may be called by any."""

    def __init__(self, output: Path | None):
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115  closed by ``end``
        self._pipe, its_end = multiprocessing.Pipe()
        descriptors = its_end.fileno(), self._trace.fileno()
        arguments = [*map(str, descriptors), json.dumps([str(path) for path in sys.path])]
        with contextlib.ExitStack() as stack:
            stack.callback(its_end.close)
            printed = stack.enter_context(output.open("ab")).fileno() if output else _STDERR
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROGRAM, *arguments],
                stdin=subprocess.PIPE,  # which nothing is written to: its end, when this process ends, is what counts
                stdout=printed,
                stderr=printed,
                pass_fds=descriptors,
                start_new_session=True,
                env=os.environ | _ENVIRONMENT,
            )
        self._lock = threading.Lock()
        self._asked = self._late = self._gone = False
        self._where = ""

    def ask(self, message: Any, seconds: float) -> Any:
        """Send a message and return the answer.

        Raises Ended where none comes within the limit; the process is gone then.
        """
        self._asked = True
        timer = threading.Timer(seconds, self._interrupt)
        timer.daemon = True
        timer.start()
        answer = None
        # It is gone, or a function wrote what nobody can read into the pipe. Both are no answer, and end it below.
        with contextlib.suppress(Exception):
            self._pipe.send(message)
            answer = self._pipe.recv()
        timer.cancel()
        with self._lock:  # from here on the timer, should it still fire, does nothing
            self._asked = False
        if answer is not None and not self._late:
            return answer
        code = self.end(_PATIENCE)
        if self._late and code in (-signal.SIGKILL, -worker.TRACE_SIGNAL):
            raise Ended(f"took longer than {seconds:g} seconds.{self._where}")
        raise Ended(f"ended its process {_how(code)}.")

    def has_ended(self) -> bool:
        """Say whether the process ended by itself, while it was not asked anything."""
        return self._gone or self._pipe.poll()

    def kill(self) -> None:
        """End the process and all that it started, now."""
        with self._lock:
            self._kill()

    def end(self, patience: float = 0.0) -> int:
        """Kill it, release all that it held, and return its exit code; let it end by itself for some seconds before."""
        with self._lock:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
            self._kill()
            self._gone = True
            code = self._process.wait()
        for opened in (self._pipe, self._trace, self._process.stdin):
            if opened is not None:
                opened.close()
        return code

    def _kill(self) -> None:
        # Not later: then its number may be another's. Until then its guard keeps it, even once it has been waited for.
        if not self._gone:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter from macOS, for a dead one
                os.killpg(self._process.pid, signal.SIGKILL)

    def _interrupt(self) -> None:
        with self._lock:
            if self._asked:
                self._late = True
                self._where = self._ask_where()
                self._kill()

    def _ask_where(self) -> str:
        """Return where in the user's code the process is, as ``functions.line_of`` does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, worker.TRACE_SIGNAL)
        deadline = time.monotonic() + _TRACE_SECONDS
        trace = ""
        while worker.__file__ not in trace and time.monotonic() < deadline:
            time.sleep(0.01)
            trace = os.pread(self._trace.fileno(), _TRACE_BYTES, 0).decode(errors="replace")
        for file, line in re.findall(r'File "(.+)", line (\d+) in', trace):
            if file in (reward.__file__, worker.__file__):
                break
            if not file.startswith((sysconfig.get_path("stdlib"), "<")):
                return f" ({file}, line {line})"
        return ""


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    hint = " (the machine may be out of memory)" if code == -signal.SIGKILL else ""
    return f"by {signal.Signals(-code).name}{hint}"

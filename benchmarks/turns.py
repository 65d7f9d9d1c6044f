"""Turns between processes that are timed against each other: only one of them ever runs.

A worker announces itself when it is about to take its first step, then takes as many steps as it is told to, reports,
and waits on the pipe for its next turn, with all that it has loaded and compiled kept. Messages are lines of JSON.
Standard library alone, since every worker's interpreter imports it.

Left out on purpose: what a step is (the workers' matter) and what the times mean (the benchmarks').
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Turns:
    """A worker's end, to be made before anything is printed, since it takes stdout for itself.

    ``facts`` are sent with the first message; ``device_peak`` returns bytes where a GPU counts them. To ``parts`` a
    worker adds the seconds of a turn by what they went into, where it can tell.
    """

    def __init__(self, device_peak: Callable[[], int | None]) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no message
        self.facts: dict[str, Any] = {}
        self.parts: dict[str, float] = {}
        self._device_peak = device_peak
        self._job: dict[str, Any] = {}
        self._steps = self._left = 0
        self._started = (0.0, 0.0)

    def before_step(self, settle: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        """Call before each step, with what waits for the steps before; returns when this one is to be taken.

        Returns what the parent's ``turn`` said about it.

        Raises SystemExit when the parent wants no more.
        """
        if self._left == 0:
            settle()
            self._report()
            self._job = json.loads(sys.stdin.readline() or '{"steps": 0}')
            self._steps = self._left = self._job.pop("steps")
            if self._left == 0:
                raise SystemExit(0)
            self.parts.clear()
            self._started = (time.perf_counter(), _cpu_seconds())
        self._left -= 1
        return self._job

    def _report(self) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._started[0], _cpu_seconds() - self._started[1]
        timed = {"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": self.parts} if self._steps else self.facts
        report = timed | {"steps": self._steps, "peak_bytes": peak_resident(), "device_peak_bytes": self._device_peak()}
        self._answers.write(json.dumps(report) + "\n")
        self._answers.flush()


class Worker:
    """The parent's end: a worker process, its first report in ``facts``. What it prints goes to ``log``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=dict(environment)
            )
        self.facts = self._read()

    def turn(self, steps: int, **job: Any) -> dict[str, Any]:
        """Let the worker take ``steps`` steps and return its report: seconds, cpu_seconds, peaks of memory.

        ``job`` says what the steps are to do, where a worker has to be told.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps, **job}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the worker and wait until it is gone, so that its memory is free for the next."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit(f"a worker ended with code {code}:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)


def peak_resident() -> int:
    """Return the most bytes that this process has held; ``getrusage`` would count those of its parent too."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system

"""Runs of one or several processes, started from a server that has imported everything, so that each starts at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier import cli

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["luthier.train.sft", "luthier.train.rl", "launched"])
LIMIT = 240.0
"""Seconds that any run of these tests may take."""


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


class Run:
    """``count`` processes of one command with ``devices`` simulated devices each; ``own`` are keys of some alone."""

    def __init__(
        self,
        command: str,
        keys: Sequence[str],
        logs: Path,
        *,
        count: int = 1,
        devices: int = 2,
        own: dict[int, Sequence[str]] | None = None,
        missing: Sequence[int] = (),
        prepare: Callable[[], None] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        address = f"coordinator_address=127.0.0.1:{free_port()}"
        self._logs = [logs / f"{command}-{number}.log" for number in range(count)]
        self.processes: dict[int, multiprocessing.process.BaseProcess] = {}
        for number in (each for each in range(count) if each not in missing):
            place = [address, f"num_processes={count}", f"process_id={number}"] if count > 1 else []
            arguments = [command, *keys, *place, *(own or {}).get(number, ())]
            process = CONTEXT.Process(target=_run, args=(arguments, devices, self._logs[number], prepare), daemon=True)
            process.start()
            self.processes[number] = process

    def output(self, number: int = 0) -> str:
        """Return what a process has printed so far."""
        return self._logs[number].read_text() if self._logs[number].exists() else ""

    def send(self, number: int, how: signal.Signals) -> None:
        """Send a process a signal."""
        os.kill(self.processes[number].pid or 0, how)

    def until(self, what: Callable[[], bool]) -> None:
        """Return once something is so; fail where the run ends before."""
        deadline = time.monotonic() + LIMIT
        while not what():
            assert time.monotonic() < deadline, self.output()
            assert all(process.is_alive() for process in self.processes.values()), self.outputs()
            time.sleep(0.01)

    def codes(self, seconds: float = LIMIT) -> list[int | None]:
        """Return the exit codes, once all have ended; None of those that have not within some seconds."""
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes.values()]

    def outputs(self) -> str:
        """Return what all have printed."""
        return "\n".join(f"--- process {number}\n{self.output(number)}" for number in self.processes)

    def done(self) -> Run:
        """Wait for the run, and fail where it failed."""
        try:
            codes = self.codes()
            assert not any(codes), f"{codes}\n{self.outputs()}"
        finally:
            self.kill()
        return self

    def kill(self) -> None:
        """End whatever of it still runs."""
        for process in self.processes.values():
            process.kill()
            process.join()


def _run(arguments: list[str], devices: int, log: Path, prepare: Callable[[], None] | None) -> None:
    """Be a process that was started by `luthier ARGUMENTS`, and changed by ``prepare``."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"  # not to be started anew for it
    if prepare is not None:
        prepare()
    sys.argv = ["luthier", *arguments]
    cli.entry()

"""A process beside a worker that ends it, and all that it started, once the process that started it is gone.

It only waits, so it gets to run whatever a reward function does to the worker's interpreter. It is in the worker's
process group, and is ended with it.

Left out on purpose: all imports that take time.
"""

from __future__ import annotations

import os
import signal


def start(*others: int) -> None:
    """Start it; to be called before there are threads. Standard input is the pipe whose end it waits for.

    It closes the file descriptors ``others``, whose ends are waited for elsewhere. Afterwards there is nothing on this
    process's standard input.
    """
    if os.fork() == 0:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            for descriptor in others:
                os.close(descriptor)
            os.read(0, 1)
        finally:
            os.killpg(0, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

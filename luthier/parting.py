"""How a process of several ends: with its own exit code and words, at once, and never waiting for one that is gone.

JAX's runtime makes a process wait at its exit for all others, and aborts it where one has died. Left out on purpose:
everything that needs jax before it is needed, since the command line imports this (``processes`` has the rest).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

PARTING_SECONDS = 10
"""How long a process that has failed waits for others that fail by the same, so that each can say so."""
RESUME = "The same command, given to all processes again, goes on from the last checkpoint."

_last_words, _last_code = "", 1
_handlers: list[Any] = []


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """End this process where the others cannot be computed with any more, saying so.

    What is entered within is closed first; its exit handlers, which would wait for every process, are left out.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _handlers or "RESOURCE_EXHAUSTED" in str(error):
            raise
        words = "a computation of all processes broke off: another of them has ended, and its output says why."
        _end(1, f"{words} {RESUME} ({str(error).splitlines()[0]})")


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process of several with its own exit code, at once, where it fails or was stopped.

    Else it would wait at its exit for others that wait for it.
    """
    try:
        yield
    except BaseException as error:
        if not _handlers or (isinstance(error, SystemExit) and not error.code):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        _part(code)


def say_last_words(words: str) -> None:
    """Have ``words`` printed, and the exit code made 1, where JAX's runtime aborts this process.

    Its service does so in a thread of its own when a process has died, and gives no Python code a chance; a handler of
    SIGABRT is what is left. Such a handler must not return, and does not.
    """
    global _last_words
    _last_words = words
    if _handlers:
        return

    def handle(number: int) -> None:
        os.write(2, _said(_last_words))  # nothing that could wait for another thread's lock
        os._exit(_last_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _handlers.append(handler)  # to be kept as long as it may be called
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _part(code: int) -> NoReturn:
    """End this process once the others have come to their end too, or after some seconds.

    One that ends later than process 0 is aborted, and that is then how it ends: with its own code, all being said.
    """
    import jax
    from jax._src import distributed  # the barrier has no public name

    global _last_words, _last_code
    _last_words, _last_code = "", code
    client = distributed.global_state.client
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier("parting", PARTING_SECONDS * 1000)
    _end(code)


def _end(code: int, words: str = "") -> NoReturn:
    """End this process now, without its exit handlers: those wait for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.write(2, _said(words))
    os._exit(code)


def _said(words: str) -> bytes:
    return f"luthier: {words}\n".encode() if words else b""

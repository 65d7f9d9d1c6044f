"""SIGTERM and Ctrl-C: a run that is training finishes its step and saves; one that is not simply ends."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Stop:
    """While entered, notes a first SIGTERM or SIGINT in ``requested`` once ``armed``; before that they end the process.

    A second one always ends the process.
    """

    def __init__(self) -> None:
        self.armed = False
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.armed or self.requested:
            raise SystemExit(EXIT_CODES[signal.Signals(number)])
        self.requested = signal.Signals(number)

"""SIGTERM and Ctrl-C: a run that is training finishes its step and saves; one that is not simply ends.

Of several processes it is enough that one is sent a signal: all agree on the step after which they save.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

import jax

from luthier import processes

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Stop:
    """While entered, notes a first SIGTERM or SIGINT in ``requested`` once ``armed``; before that they end the process.

    A second one always ends the process.
    """

    def __init__(self) -> None:
        self.armed = False
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._asked: jax.Array | None = None

    def agreed(self, *, late: bool = False) -> signal.Signals | None:
        """Return the signal at which all processes stop now, if one of them was sent any; all call it in each step.

        With ``late``, of several processes, it is what was so at the call before: nobody waits for the devices then.
        """
        if not processes.several():
            return self.requested
        before, self._asked = self._asked, processes.greatest(self.requested or 0)
        found = before if late else self._asked
        number = 0 if found is None else int(found)
        return signal.Signals(number) if number else None

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

"""A trace of a few steps, for TensorBoard's profile plug-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from luthier.config import RunKeys


class Profile:
    """Starts and stops a trace by the ``profiler*`` keys: call ``before`` each step, and ``close`` at the end.

    ``due`` says that a trace is wanted and has not begun.
    """

    def __init__(self, config: RunKeys, folder: Path, first_step: int) -> None:
        self.due = bool(config.profiler)
        self._start = first_step + config.skip_first_n_steps_for_profiler
        self._stop = self._start + config.profiler_steps
        self._folder = folder
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Start or stop the trace if it is due before ``step``; ``state`` is what the steps so far give."""
        if self.due and step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running, self.due = True, False
        if self._running and step == self._stop:
            self.close(state)

    def close(self, state: Any) -> None:
        """Stop the trace, if it runs, once ``state`` is there: a device may be steps behind."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False

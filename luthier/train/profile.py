"""A trace of a few steps, for TensorBoard's profile plug-in."""

from __future__ import annotations

from pathlib import Path

import jax

from luthier.config import RunKeys


class Profile:
    """Starts and stops a trace by the ``profiler*`` keys: call ``before`` each step, and ``close`` at the end."""

    def __init__(self, config: RunKeys, folder: Path, first_step: int) -> None:
        self._start = first_step + config.skip_first_n_steps_for_profiler if config.profiler else -1
        self._stop = self._start + config.profiler_steps
        self._folder = folder
        self._running = False

    def before(self, step: int) -> None:
        """Start or stop the trace if it is due before ``step``."""
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if self._running and step == self._stop:
            self.close()

    def close(self) -> None:
        """Stop the trace if it still runs, as where a run is shorter than the trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

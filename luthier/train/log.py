"""One step's numbers, from the device to the files and the screen; and the refusal to go on from a loss that is none.

Numbers are read one step late, while the next step runs, so that looking at them never makes the device wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from luthier.errors import RunError
from luthier.train.display import Steps
from luthier.train.metrics import Writer


class Log:
    """Reports each step once the next was started, or on ``flush``.

    ``flops_per_second_peak`` and ``flops_per_token`` give MFU where the device's peak is known; ``name_rows`` turns the
    row numbers of a batch into words for the message about a bad one.
    """

    def __init__(
        self,
        writer: Writer,
        shown: Steps,
        name_rows: Callable[[Any], str],
        *,
        period: int,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        self._writer, self._shown, self._name_rows, self._period = writer, shown, name_rows, period
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._pending: tuple[int, Mapping[str, jax.Array], Any, float] | None = None
        self._clock = time.perf_counter()

    def push(self, step: int, values: Mapping[str, jax.Array], rows: Any, learning_rate: float) -> None:
        """Take the numbers of a step that was just started, and report the one before it."""
        self.flush()
        self._pending = (step, values, rows, learning_rate)

    def flush(self) -> None:
        """Report the step that is still pending, waiting for it.

        Raises RunError naming the step and its rows where the loss or the gradient is not finite.
        """
        if self._pending is None:
            return
        (step, values, rows, learning_rate), self._pending = self._pending, None
        numbers = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            raise RunError(
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}. The batch held "
                f"{self._name_rows(rows)}. Nothing of this step is saved; an earlier checkpoint stands. Look at these "
                "rows, or lower learning_rate, in a run of another run_name."
            )
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        numbers |= {"learning_rate": learning_rate, "tokens_per_second": numbers["num_tokens"] / seconds}
        if self._peak_flops:
            numbers["mfu"] = numbers["tokens_per_second"] * self._flops_per_token / self._peak_flops
        self._shown.update(step, numbers)
        if step % self._period == 0:
            self._writer.write(step, numbers)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of an evaluation, which takes no part in a step's time."""
        numbers = {f"eval/{name}": value for name, value in values.items()}
        self._writer.write(step, numbers)
        self._shown.say(
            f"held-out rows at step {step}: loss {values['loss']:.4f}, "
            f"token accuracy {values['mean_token_accuracy']:.3f}"
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of the next one's time."""
        self._clock = time.perf_counter()

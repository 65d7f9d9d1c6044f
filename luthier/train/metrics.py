"""Where numbers go: a row a step in ``metrics.jsonl`` and TensorBoard, and what a device can do at its best."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from luthier import processes

# Dense bf16 peak of one device in TFLOP/s, from the makers' data sheets; the first that stands in the kind counts.
PEAK_TFLOPS = {
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU v5p": 459.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v4": 275.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak bf16 FLOP/s of a device, or None where it is not known (as for every CPU)."""
    named = (tflops for kind, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{kind}\b", device_kind))
    return next((tflops * 1e12 for tflops in named), None)


class Writer:
    """Appends a row of numbers for a step to ``metrics.jsonl`` and to TensorBoard's event file.

    Rows of steps after ``resumed_at`` are dropped on opening: a resumed run takes those steps again. ``evaluations``
    are those of the steps before, by step. Of several processes the first writes, and all know its evaluations.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        self._file = self._events = None
        kept: list[dict[str, Any]] = []
        if processes.is_first():
            from tensorboardX import SummaryWriter

            path = folder / "metrics.jsonl"
            kept = _drop_after(path, resumed_at)
            self._file = path.open("a")
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)
        self.evaluations = processes.tell({row["step"]: found for row in kept if (found := _evaluation(row))})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one row, at once."""
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for opened in (self._file, self._events):
            if opened is not None:
                opened.close()


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the rows up to ``step`` and return them."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if _whole(line)]
    kept = [row for row in rows if row["step"] <= step]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _evaluation(row: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}


def _whole(row: str) -> bool:
    """Say whether a row was written to its end: a killed run can leave half of its last one."""
    return row.startswith("{") and row.endswith("}")

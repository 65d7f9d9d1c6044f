"""Where numbers go: a row a step in ``metrics.jsonl`` and TensorBoard, and what a device can do at its best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

# Dense bf16 peak of one device in TFLOP/s, from the makers' data sheets; the first entry that the kind contains counts.
PEAK_TFLOPS = {
    "TPU v6": 918.0,
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
    return next((tflops * 1e12 for kind, tflops in PEAK_TFLOPS.items() if kind in device_kind), None)


def flops_per_token(weights: int, layers: int, heads: int, head_dim: int, length: int) -> float:
    """Return the FLOPs that training one token takes, recomputation not counted.

    6 for each weight that multiplies, and 12 for each layer, head dimension and position (PaLM, arXiv 2204.02311,
    appendix B), halved since attention is causal.
    """
    return 6.0 * weights + 6.0 * layers * heads * head_dim * length


class Writer:
    """Appends a row of numbers for a step to ``metrics.jsonl`` and to TensorBoard's event file.

    Rows of steps after ``resumed_at`` are dropped on opening: a resumed run takes those steps again.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        _drop_after(self._path, resumed_at)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one row, at once."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._events.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = path.read_text().splitlines()
    kept = [row for row in rows if _whole(row) and json.loads(row)["step"] <= step]
    path.write_text("".join(row + "\n" for row in kept))


def _whole(row: str) -> bool:
    """Say whether a row was written to its end: a killed run can leave half of its last one."""
    return row.startswith("{") and row.endswith("}")

"""Rows of numbers: what is written, what is dropped on resuming, what stops a run."""

import io
import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console

from luthier.errors import RunError
from luthier.train import display, metrics
from luthier.train.log import Log


def values(loss: float = 1.0, grad_norm: float = 0.5) -> dict:
    numbers = {"loss": loss, "grad_norm": grad_norm, "mean_token_accuracy": 0.5, "num_tokens": 100.0}
    return {name: jnp.float32(value) for name, value in numbers.items()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_log(folder: Path, period: int = 1, **peaks: float) -> tuple[Log, io.StringIO]:
    output = io.StringIO()
    writer = metrics.Writer(folder, 0)
    steps = display.Steps(Console(file=output, width=200), total=10, done=0)
    settings = {"flops_per_token": 1.0, "peak_flops": None} | peaks
    return Log(writer, steps, lambda batch: f"rows {batch}", period=period, **settings), output


def test_a_step_is_reported_once_the_next_was_started(tmp_path: Path) -> None:
    log, output = make_log(tmp_path)
    log.push(1, values(2.0), [0], 1e-3)
    assert rows(tmp_path) == []
    log.push(2, values(), [1], 1e-3)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 2.0)]
    log.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert rows(tmp_path)[0]["learning_rate"] == 1e-3
    assert "step 1/10  loss 2.0000" in output.getvalue()
    assert "mfu" not in rows(tmp_path)[0]


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.nan}])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, bad: dict) -> None:
    log, _ = make_log(tmp_path)
    log.push(1, values(), [0], 1e-3)
    log.push(2, values(**bad), [7, 8], 1e-3)
    with pytest.raises(RunError, match=r"step 2: .*rows \[7, 8\]"):
        log.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_mfu_is_the_share_of_the_peak(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path, flops_per_token=1e6, peak_flops=1e9)
    log.push(1, values(), [0], 1e-3)
    log.flush()
    row = rows(tmp_path)[0]
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e-3)


def test_the_period_thins_rows_out(tmp_path: Path) -> None:
    log, _ = make_log(tmp_path, period=3)
    for step in range(1, 8):
        log.push(step, values(), [0], 1e-3)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]


def test_resuming_drops_the_rows_that_are_taken_again(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a killed process leaves
    with metrics.Writer(tmp_path, 2) as writer:
        writer.write(3, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("kind", "tflops"), [("TPU v5p", 459), ("TPU v5 lite", 197), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312)]
)
def test_peaks_are_found_by_the_devices_name(kind: str, tflops: float) -> None:
    assert metrics.peak_flops(kind) == tflops * 1e12
    assert metrics.peak_flops("cpu") is None
    assert metrics.peak_flops("NVIDIA L40") is None
    assert metrics.peak_flops("NVIDIA RTX A1000") is None


@pytest.mark.parametrize(("number", "text"), [(134_515_008, "134.5M"), (999, "999"), (1.2e12, "1.2T"), (8e9, "8.0B")])
def test_quantities_are_written_as_people_do(number: float, text: str) -> None:
    assert display.quantity(number) == text
    assert display.duration(3725) == "1:02:05"

"""A run that goes on elsewhere: what may change between its parts, and what the step's rows have to do with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from luthier import processes
from luthier.errors import UserError
from luthier.train import folder, saving
from tiny import ROOT

BEGUN = SimpleNamespace(data=lambda: {"rows": 48, "batch_size": 24, "fingerprint": "x"})


@pytest.mark.parametrize(
    ("rows", "shards", "accumulate"), [(24, 1, 1), (3, 8, 1), (3, 4, 2), (1, 24, 1), (1, 1, 24), (12, 2, 1)]
)
def test_a_step_of_the_same_rows_goes_on(rows, shards, accumulate):
    config = SimpleNamespace(per_device_batch_size=rows, gradient_accumulation_steps=accumulate)
    saving.check_rows(BEGUN, config, shards, Path("run"))


@pytest.mark.parametrize(
    ("rows", "shards", "accumulate", "remedy"),
    [
        (3, 4, 1, "Set per_device_batch_size=3 gradient_accumulation_steps=2"),
        (4, 4, 2, "Set per_device_batch_size=3 gradient_accumulation_steps=2"),
        (8, 8, 8, "Set per_device_batch_size=3 gradient_accumulation_steps=1"),
        (2, 16, 1, "Split rows over 12 devices"),
        (2, 5, 1, "Split rows over 4 devices"),
    ],
)
def test_another_step_is_refused_with_what_keeps_it(rows, shards, accumulate, remedy):
    config = SimpleNamespace(per_device_batch_size=rows, gradient_accumulation_steps=accumulate)
    with pytest.raises(UserError) as caught:
        saving.check_rows(BEGUN, config, shards, Path("run"))
    message = str(caught.value)
    assert message.startswith("run: begun with 24 rows in a step, and this command has per_device_batch_size=")
    assert f"= {rows * shards * accumulate}. {remedy}" in message


def test_a_run_that_is_not_begun_may_have_any_step():
    config = SimpleNamespace(per_device_batch_size=5, gradient_accumulation_steps=5)
    for kept in (None, SimpleNamespace(data=lambda: None)):
        saving.check_rows(kept, config, 5, Path("run"))


def test_machines_that_do_not_share_the_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda _: [True, False, True, False])
    config = SimpleNamespace(base_output_directory=str(tmp_path), run_name="run", enable_checkpointing=True)
    with (
        pytest.raises(UserError, match=r"of the processes, 1, 3 see nothing of what process 0 wrote to .*run\. Give a"),
        saving.checkpoints(config, tmp_path / "run"),
    ):
        raise AssertionError


def test_what_a_run_goes_on_with_may_be_other_machines():
    assert {"ici_fsdp_parallelism", "dcn_data_parallelism", "num_processes", "process_id"} <= folder.CONTINUABLE
    assert not {"learning_rate", "seed", "max_target_length", "loss_algo"} & folder.CONTINUABLE


def run(place: Path, model: Path, rows: Path, devices: int, *keys: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "luthier.train.sft", f"base_output_directory={place}", "run_name=run"),
        *(f"load_parameters_path={model}", f"hf_path={rows}", "max_target_length=64", "learning_rate=1e-3"),
        *("checkpoint_period=2", "num_epoch=4", f"jax_cache_dir={ROOT / '.cache' / 'jax'}", *keys),
    ]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "COLUMNS": "200"}
    return subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False
    )


def losses(place: Path) -> np.ndarray:
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return np.array([row["loss"] for row in map(json.loads, lines) if "loss" in row])


ACCUMULATED = ("per_device_batch_size=1", "gradient_accumulation_steps=4")
PARTS = (
    (1, ("steps=2", "per_device_batch_size=8")),
    (8, ("steps=4", "ici_fsdp_parallelism=4", "ici_tensor_parallelism=2", "per_device_batch_size=2")),
    (2, ("steps=6", "ici_data_parallelism=2", "ici_fsdp_parallelism=1", *ACCUMULATED)),
)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_goes_on_on_more_and_fewer_devices_as_if_nothing_had_changed(tmp_path, tiny_model, tiny_rows):
    """At a constant rate, since a schedule is that of the steps that are asked for."""
    whole = run(tmp_path / "whole", tiny_model, tiny_rows, 1, "steps=6", "lr_schedule_type=constant", *PARTS[0][1][1:])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for devices, keys in PARTS:
        done = run(tmp_path / "parts", tiny_model, tiny_rows, devices, "lr_schedule_type=constant", *keys)
        assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-5)
    assert len(losses(tmp_path / "whole")) == 6
    refused = run(tmp_path / "parts", tiny_model, tiny_rows, 1, "lr_schedule_type=constant", "per_device_batch_size=3")
    assert refused.returncode == 2
    assert "begun with 8 rows in a step" in refused.stderr
    assert "Set per_device_batch_size=2 gradient_accumulation_steps=4, or another run_name." in refused.stderr

"""The run as a user starts it: whole, stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import tiny
from luthier import cli
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch
from tiny import ROOT

pytestmark = pytest.mark.multiprocess

ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
STEPS = 40


def command(folder: Path, model: Path, rows: Path, *keys: str) -> list[str]:
    """The command line of a run of 40 steps on the tiny model."""
    return [
        *(sys.executable, "-m", "luthier.train.sft", f"base_output_directory={folder}", "run_name=run"),
        *(f"load_parameters_path={model}", f"hf_path={rows}", "max_target_length=64", "per_device_batch_size=2"),
        *(f"steps={STEPS}", "checkpoint_period=5", "learning_rate=1e-3", f"jax_cache_dir={ROOT / '.cache' / 'jax'}"),
        *keys,
    ]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def metrics(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def stop_after(folder: Path, steps: int, how: signal.Signals, *arguments: object) -> tuple[int, str]:
    """Start a run, send it a signal once ``steps`` steps are reported, and return its exit code and output."""
    with subprocess.Popen(
        command(folder, *arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 240
        while len(metrics(folder)) < steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(how)
        output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_rows: Path) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, tiny_model, tiny_rows, "eval_fraction=0.1")
    assert done.returncode == 0, done.stderr
    (folder / "output").write_text(done.stdout)
    return folder


def same_steps(one: Path, other: Path) -> None:
    """Weights and numbers of two runs agree bit for bit."""
    ours, theirs = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    values = [
        {row["step"]: (row["loss"], row["grad_norm"]) for row in metrics(folder) if "loss" in row}
        for folder in (one, other)
    ]
    assert values[0] == values[1]
    assert sorted(values[0]) == list(range(1, STEPS + 1))


def test_a_run_leaves_what_it_should_and_learns(whole: Path) -> None:
    rows = [row for row in metrics(whole) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy", "tokens_per_second"} <= rows[
        0
    ].keys()
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    evaluations = [row for row in metrics(whole) if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, STEPS]
    assert evaluations[1]["eval/loss"] < evaluations[0]["eval/loss"]
    here = whole / "run"
    saved = {path.name for path in (here / "model").iterdir()}
    assert saved >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert (here / "checkpoints" / str(STEPS)).is_dir()
    assert list((here / "tensorboard").glob("events*"))
    assert yaml.safe_load((here / "config.yml").read_text())["steps"] == STEPS


def test_the_user_sees_what_is_trained_and_what_came_of_it(whole: Path) -> None:
    output = (whole / "output").read_text()
    counts = ("36 rows", "4 rows", f"{STEPS} steps of adamw", f"step {STEPS}/{STEPS}")
    for words in ("parameters", "1 x cpu", "GiB", *counts):
        assert words in output
    assert "⟦" in output.split("First example")[1]
    assert "<|im_end|>⟧" in output
    assert "held-out loss" in output
    assert str(whole / "run" / "model") in output


def test_the_recipe_that_a_run_leaves_repeats_it(
    whole: Path, tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    recipe = whole / "run" / "config.yml"
    again = subprocess.run(
        [sys.executable, "-m", "luthier", "sft", str(recipe), f"base_output_directory={tmp_path}"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    same_steps(whole, tmp_path)


def test_killed_and_resumed_equals_never_killed(whole: Path, tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = (tiny_model, tiny_rows, "eval_fraction=0.1")
    code, _ = stop_after(tmp_path, 14, signal.SIGKILL, *keys)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    done = run(tmp_path, *keys)
    assert done.returncode == 0, done.stderr
    assert "Going on after step" in done.stdout
    same_steps(whole, tmp_path)


def test_sigterm_saves_and_exits_143(whole: Path, tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = (tiny_model, tiny_rows, "eval_fraction=0.1", "checkpoint_period=1000")
    code, output = stop_after(tmp_path, 7, signal.SIGTERM, *keys)
    assert code == 143, output
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert 7 <= saved[0] < STEPS
    assert f"Stopped by SIGTERM after step {saved[0]}" in output
    done = run(tmp_path, *keys)
    assert done.returncode == 0, done.stderr
    assert f"Going on after step {saved[0]}" in done.stdout
    same_steps(whole, tmp_path)


def test_the_same_command_on_a_finished_run_trains_nothing(whole: Path, tiny_model: Path, tiny_rows: Path) -> None:
    before = metrics(whole)
    again = run(whole, tiny_model, tiny_rows, "eval_fraction=0.1")
    assert again.returncode == 0, again.stderr
    assert f"Going on after step {STEPS} of {STEPS}" in again.stdout
    assert metrics(whole) == before


def test_a_different_run_in_the_same_folder_is_refused(whole: Path, tiny_model: Path, tiny_rows: Path) -> None:
    other = run(whole, tiny_model, tiny_rows, "eval_fraction=0.1", "learning_rate=1e-4")
    assert other.returncode == 2
    assert "holds a different run: learning_rate (there 0.001, here 0.0001)" in other.stderr
    assert "run_name" in other.stderr


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    done = run(tmp_path, tiny_model, tiny_rows, "learning_rate=1e30", "warmup_steps_fraction=0", "opt_type=sgd",
               "gradient_clipping_threshold=0", "checkpoint_period=1")  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "loss nan" in done.stderr or "loss inf" in done.stderr
    assert f"{tiny_rows}" in done.stderr
    assert "line" in done.stderr
    step = int(done.stderr.split("step ")[1].split(":")[0])
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [step - 1]
    assert not (tmp_path / "run" / "model").exists()


def test_every_kind_of_model_trains_goes_on_and_opens_in_transformers(
    other_model: Path, tmp_path: Path, tiny_rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Dense layers with windows, experts on a mesh with their axis, and latent attention."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    keys = [
        *command(tmp_path, other_model, tiny_rows, "lr_schedule_type=constant", "warmup_steps_fraction=0")[3:],
        *("dtype=float32", "learning_rate=1e-2", "checkpoint_period=100", "per_device_batch_size=1"),
        "ici_expert_parallelism=2",
    ]
    experts = "gemma3" not in other_model.name
    keys += ["load_balance_loss_weight=0.01", "router_z_loss_weight=0.001"] if experts else []
    assert cli.main(["sft", *keys, "steps=6"]) == 0
    assert cli.main(["sft", *keys, "steps=12"]) == 0
    assert "Going on after step 6 of 12" in capfd.readouterr().out
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert (rows[0].keys() >= {"load_balance_loss", "expert_load/max"}) == experts
    saved = tmp_path / "run" / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (other_model, saved))
    assert before.keys() == after.keys()
    unmoved = {name for name in before if np.array_equal(before[name], after[name])}
    assert unmoved == {name for name in before if "correction" in name}
    model, found = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(found.values())
    opened = Model.from_hf(json.loads((saved / "config.json").read_text()), "saved")
    ids = np.arange(40, dtype=np.int32)[None] % 200
    batch = Batch(ids, np.arange(40, dtype=np.int32)[None], np.ones_like(ids), ids > 0)
    ours = opened.logits(tiny.params_from_torch(opened.spec, model), batch, Compute())
    with torch.no_grad():
        theirs = model.float()(torch.tensor(ids, dtype=torch.long)).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3)


@pytest.mark.slow
def test_a_trace_is_written(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    done = run(tmp_path, tiny_model, tiny_rows, "steps=4", "profiler=xplane", "skip_first_n_steps_for_profiler=1")
    assert done.returncode == 0, done.stderr
    traces = list((tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


def test_fewer_steps_than_were_taken_are_refused(whole: Path, tiny_model: Path, tiny_rows: Path) -> None:
    done = run(whole, tiny_model, tiny_rows, "eval_fraction=0.1", "steps=7")
    assert done.returncode == 2
    assert f"has taken {STEPS} steps, and the command asks for 7" in done.stderr


def test_other_data_under_the_same_name_is_refused(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = tiny_rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines))
    assert run(tmp_path, tiny_model, rows, "steps=2").returncode == 0
    rows.write_text("".join(lines[:20]))
    changed = run(tmp_path, tiny_model, rows, "steps=4")
    assert changed.returncode == 2
    assert "run_name" in changed.stderr


@pytest.mark.slow
def test_more_steps_go_on_from_a_finished_run(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = (tiny_model, tiny_rows, "lr_schedule_type=constant", "warmup_steps_fraction=0")
    assert run(tmp_path, *keys, "steps=3").returncode == 0
    done = run(tmp_path, *keys, "steps=5")
    assert "Going on after step 3 of 5" in done.stdout
    straight = tmp_path / "straight"
    assert run(straight, *keys, "steps=5").returncode == 0
    pair = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (tmp_path, straight))
    for ours, theirs in zip(*(tensors.values() for tensors in pair), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_that_never_got_to_a_step_can_start_with_other_keys(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yml").write_text("learning_rate: 1.0\n")
    assert run(tmp_path, tiny_model, tiny_rows, "steps=1").returncode == 0

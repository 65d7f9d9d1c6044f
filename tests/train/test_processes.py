"""Several processes on this machine are one run: the same numbers, one set of files, one end."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_rl
import yaml
from launched import Run
from safetensors.numpy import load_file, save_file

import tiny
from tiny import ROOT

pytestmark = pytest.mark.multiprocess

STEPS = 6
TOLERANCE = 1e-5
TIMES = ("seconds", "tokens_per_second")
LOST_AFTER = "jax_distributed_heartbeat_timeout_seconds=10"
"""How long a process that has died is waited for by one that writes a checkpoint with it."""
AXES = {
    "fsdp": (),
    "data": ("ici_data_parallelism=2", "ici_fsdp_parallelism=2"),
    "tensor": ("ici_tensor_parallelism=4", "ici_fsdp_parallelism=1", "per_device_batch_size=4"),
    "tensor-fsdp": ("ici_tensor_parallelism=2", "per_device_batch_size=2"),
}
"""How the same rows a step are split over four devices."""


def sft(folder: Path, model: Path, rows: Path, *keys: str) -> list[str]:
    """The keys of a run of 6 steps of 8 rows on four devices."""
    return [
        *(f"base_output_directory={folder}", "run_name=run", f"load_parameters_path={model}", f"hf_path={rows}"),
        *("max_target_length=64", "per_device_batch_size=1", "gradient_accumulation_steps=2", "dtype=float32"),
        *(f"steps={STEPS}", "learning_rate=1e-3", "checkpoint_period=2", "save_dtype=float32", "eval_fraction=0.1"),
        *(f"jax_cache_dir={ROOT / '.cache' / 'jax'}", *keys),
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def steps(folder: Path) -> int:
    """The last step that was reported."""
    return max((row["step"] for row in metrics(folder) if "loss" in row), default=0)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "run" / "checkpoints").glob("*") if path.name.isdigit())


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "model" / "model.safetensors")


def close(one: Path, other: Path) -> None:
    """The losses of two runs agree, each there once, and the held-out ones; a resumed run may have more of these."""
    for name in ("loss", "eval/loss", "num_tokens"):
        ours, theirs = ([(row["step"], row[name]) for row in metrics(folder) if name in row] for folder in (one, other))
        assert name == "eval/loss" or len(ours) == len(theirs) == len(dict(theirs))
        assert dict(theirs) == pytest.approx(dict(theirs) | dict(ours), abs=TOLERANCE), name


def identical(one: Path, other: Path) -> None:
    """The numbers and the weights of two runs agree to the bit."""
    assert metrics(one) == metrics(other)
    ours, theirs = weights(one), weights(other)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def moved_alike(before: dict[str, np.ndarray], one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Two runs that began with the same weights have moved them alike, as a whole.

    Adam divides each gradient by its own size, so that one weight whose gradient is rounding alone may go either way.
    """
    for name, weight in one.items():
        apart, moved = np.linalg.norm(other[name] - weight), np.linalg.norm(weight - before[name])
        assert apart <= 1e-4 * moved, f"{name}: {apart:.2e} apart, having moved by {moved:.2e}"


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one layer, which starts and trains quickly."""
    folder = tmp_path_factory.mktemp("model") / "one-layer"
    tiny.write_model(folder)
    written = folder / "config.json"
    config = json.loads(written.read_text())
    written.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_rows: Path) -> Path:
    """The folder of a run of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    Run("sft", sft(folder, tiny_model, tiny_rows), folder / "logs", devices=4).done()
    return folder


FURTHER = [(2, "data"), (2, "tensor"), (2, "tensor-fsdp"), (4, "fsdp"), (4, "data"), (4, "tensor")]


@pytest.mark.parametrize(
    ("count", "axes"), [(2, "fsdp"), *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)]
)
def test_several_processes_train_as_one_does(
    alone: Path, tmp_path: Path, tiny_model: Path, tiny_rows: Path, count: int, axes: str
) -> None:
    keys = sft(tmp_path, tiny_model, tiny_rows, *AXES[axes])
    run = Run("sft", keys, tmp_path / "logs", count=count, devices=4 // count).done()
    close(alone, tmp_path)
    moved_alike(load_file(tiny_model / "model.safetensors"), weights(alone), weights(tmp_path))
    here = tmp_path / "run"
    assert saved(tmp_path) == [STEPS]
    assert len(list((here / "tensorboard").glob("events*"))) == 1
    recipe = yaml.safe_load((here / "config.yml").read_text())
    assert recipe["steps"] == STEPS
    assert not {"coordinator_address", "num_processes", "process_id"} & recipe.keys()  # it repeats the run anywhere
    assert f"step {STEPS}/{STEPS}" in run.output(0)
    assert all("step" not in run.output(number) for number in range(1, count))


@pytest.mark.slow
def test_a_signal_to_one_of_them_stops_all_and_one_process_goes_on(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    keys = ("steps=30", "checkpoint_period=1000")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Run("sft", sft(whole, tiny_model, tiny_rows, *keys), whole / "logs", devices=4).done()
    run = Run("sft", sft(stopped, tiny_model, tiny_rows, *keys), stopped / "logs", count=2)
    run.until(lambda: steps(stopped) >= 3)
    run.send(1, signal.SIGTERM)
    assert run.codes(60) == [143, 143], run.outputs()
    (step,) = saved(stopped)
    assert step < 30
    assert f"Stopped by SIGTERM after step {step}. Saved" in run.output(0)
    assert "Stopped" not in run.output(1)
    run = Run("sft", sft(stopped, tiny_model, tiny_rows, *keys), stopped / "logs", devices=4).done()
    assert f"Going on after step {step} of 30" in run.output()
    close(whole, stopped)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "keys", [("checkpoint_period=1000",), ("checkpoint_period=1", LOST_AFTER)], ids=["step", "save"]
)
def test_a_killed_process_ends_the_others_which_say_so(
    tmp_path: Path, tiny_model: Path, tiny_rows: Path, keys: tuple[str, ...], victim: int
) -> None:
    """At once while they train; those that may be writing a checkpoint with it, once it counts as dead."""
    run = Run("sft", sft(tmp_path, tiny_model, tiny_rows, "steps=400", *keys), tmp_path / "logs", count=2)
    other = 1 - victim
    try:
        run.until(lambda: steps(tmp_path) >= 3)
        run.send(victim, signal.SIGKILL)
        codes = run.codes(40)
        assert codes[victim] == -signal.SIGKILL
        assert codes[other] == 1, run.outputs()
    finally:
        run.kill()
    assert "another" in run.output(other)
    assert "goes on from the last checkpoint" in run.output(other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("count", "kills"), [(1, 5), *(pytest.param(count, 30, marks=pytest.mark.exhaustive) for count in (1, 2))]
)
def test_kills_at_random_leave_the_same_run(
    tmp_path: Path, one_layer: Path, tiny_rows: Path, count: int, kills: int
) -> None:
    """Of one process and of two, of which either may be killed: starting, training, saving or exporting."""
    random = np.random.default_rng(count)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    keys = (f"steps={6 * kills}", "checkpoint_period=2", "eval_fraction=0")
    keys += ("jax_distributed_initialization_timeout=20", LOST_AFTER)  # one killed as it starts is waited for so long
    Run("sft", sft(whole, one_layer, tiny_rows, *keys), whole / "logs", count=count, devices=1).done()
    for _ in range(kills):
        run = Run("sft", sft(killed, one_layer, tiny_rows, *keys), killed / "logs", count=count, devices=1)
        try:
            if random.random() < 0.9:  # else while it starts
                wanted = steps(killed) + int(random.integers(1, 5))
                run.until(lambda wanted=wanted: steps(killed) >= wanted)
            time.sleep(random.random() / 50)
            run.send(int(random.integers(count)), signal.SIGKILL)
            codes = run.codes(60)
            assert set(codes) in ({-signal.SIGKILL}, {-signal.SIGKILL, 1}), f"{codes}\n{run.outputs()}"
        finally:
            run.kill()
    Run("sft", sft(killed, one_layer, tiny_rows, *keys), killed / "logs", count=count, devices=1).done()
    identical(whole, killed)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = sft(tmp_path, tiny_model, tiny_rows, "steps=400", LOST_AFTER)
    run = Run("sft", keys, tmp_path / "logs", count=2)
    try:
        run.until(lambda: steps(tmp_path) >= 3)
        run.send(1, signal.SIGSTOP)
        run.processes[0].join(25)
        assert run.processes[0].exitcode == 1, run.outputs()
        assert "another process of this run has died or gives no sign of life" in run.output(0)
    finally:
        run.kill()


def test_keys_that_differ_are_refused_by_name(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = sft(tmp_path, tiny_model, tiny_rows)
    run = Run("sft", keys, tmp_path / "logs", count=2, own={1: ["learning_rate=2e-3", "jax_cache_dir="]})
    assert run.codes(60) == [2, 2], run.outputs()
    for number in (0, 1):
        assert "learning_rate (0.001 in process 0, 0.002 in process 1)" in run.output(number)
        assert "jax_cache_dir" not in run.output(number)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_all_come_are_told_so(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = sft(tmp_path, tiny_model, tiny_rows, "jax_distributed_initialization_timeout=8")
    run = Run("sft", keys, tmp_path / "logs", count=2, missing=[1])
    assert run.codes(60) == [1], run.outputs()
    assert "Not all came within 8 s" in run.output()
    assert "num_processes=2" in run.output()


@pytest.mark.slow
def test_a_mistake_that_all_make_is_told_by_each(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    keys = sft(tmp_path, tiny_model, tiny_rows, "train_split=nothing")
    run = Run("sft", keys, tmp_path / "logs", count=2)
    assert run.codes(60) == [2, 2], run.outputs()
    assert all("train_split" in run.output(number) for number in (0, 1))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return test_rl.write_rows(tmp_path_factory.mktemp("questions") / "rows.jsonl")


def rl(folder: Path, model: Path, questions: Path, *keys: str, **values: Any) -> list[str]:
    """The keys of a run of 4 steps of reinforcement learning on four devices, held against a reference policy."""
    values = {"chips_per_vm": None, "prompts_per_step": 4, "beta": 0.04, "eval_fraction": 0.2} | values
    return [*test_rl.arguments(folder, model, questions, **values), "save_dtype=float32", *keys]


@pytest.fixture(scope="module")
def rl_alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, questions: Path) -> Path:
    """The folder of a run of one process with four devices."""
    folder = tmp_path_factory.mktemp("rl-alone")
    Run("rl", rl(folder, tiny_model, questions), folder / "logs", devices=4).done()
    return folder


def same_completions(one: Path, other: Path) -> None:
    """What was sampled, and what it was worth."""
    for number in range(1, test_rl.STEPS + 1):
        ours, theirs = test_rl.completions(one, number), test_rl.completions(other, number)
        assert len(ours) == len(theirs) == 16
        for mine, its in zip(ours, theirs, strict=True):
            for name in ("place", "sample", "completion", "rewards", "policy_versions"):
                assert mine[name] == its[name]
            assert mine["advantage"] == pytest.approx(its["advantage"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "axes"),
    [
        (2, "fsdp"),
        (2, "tensor"),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(2, "data"), (4, "fsdp")]),
    ],
)
def test_several_processes_sample_and_learn_as_one_does(
    rl_alone: Path, tmp_path: Path, tiny_model: Path, questions: Path, count: int, axes: str
) -> None:
    keys = rl(tmp_path, tiny_model, questions, *AXES[axes])
    Run("rl", keys, tmp_path / "logs", count=count, devices=4 // count).done()
    same_completions(rl_alone, tmp_path)
    for mine, its in zip(test_rl.metrics(rl_alone), test_rl.metrics(tmp_path), strict=True):
        for name in ("loss", "kl", "reward", "entropy", "completions/mean_length"):
            assert name not in mine or its[name] == pytest.approx(mine[name], abs=TOLERANCE), (name, mine["step"])
    evaluations = [test_rl.metrics(folder, evaluations=True) for folder in (rl_alone, tmp_path)]
    assert evaluations[0] == evaluations[1]
    assert (tmp_path / "run" / "rewards.log").exists()
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1


@pytest.mark.slow
def test_what_only_one_process_can_know_is_told_to_all(tmp_path: Path, tiny_model: Path, questions: Path) -> None:
    """An environment and a reward that answer by chance: processes that asked for themselves would part ways."""
    here = test_rl.HERE / "rl_rewards.py"
    played = (f"environment={here}:Whim", "max_turns=3", "steps=2")
    keys = rl(tmp_path, tiny_model, questions, *played, reward_functions=test_rl.reward("chance"))
    Run("rl", keys, tmp_path / "logs", count=2).done()
    rows = test_rl.completions(tmp_path, 1) + test_rl.completions(tmp_path, 2)
    assert {row["turns"] for row in rows} >= {1, 2}
    assert len({row["reward"] for row in rows}) > 16


@pytest.mark.slow
def test_a_reward_that_is_none_is_refused_by_all(tmp_path: Path, tiny_model: Path, questions: Path) -> None:
    for name in ("wants_a_column", "is_not_there"):
        keys = rl(tmp_path, tiny_model, questions, reward_functions=test_rl.reward(name))
        run = Run("rl", keys, tmp_path / "logs", count=2)
        assert run.codes(90) == [2, 2], run.outputs()
        assert all(name in run.output(number) for number in (0, 1))


def test_sampling_ahead_is_refused_for_several_processes(tmp_path: Path, tiny_model: Path, questions: Path) -> None:
    run = Run("rl", rl(tmp_path, tiny_model, questions, max_staleness=1), tmp_path / "logs", count=2)
    assert run.codes(60) == [2, 2], run.outputs()
    assert "max_staleness=1: of several processes all sample and train by turns" in run.output(1)


@pytest.mark.slow
def test_rl_stops_at_a_signal_to_one_and_goes_on_in_one_process(
    rl_alone: Path, tmp_path: Path, tiny_model: Path, questions: Path
) -> None:
    keys = rl(tmp_path, tiny_model, questions)
    run = Run("rl", keys, tmp_path / "logs", count=2)
    run.until(lambda: steps(tmp_path) >= 1)
    run.send(1, signal.SIGTERM)
    assert run.codes(60) == [143, 143], run.outputs()
    (step,) = saved(tmp_path)
    Run("rl", keys, tmp_path / "logs", devices=4).done()
    assert step < test_rl.STEPS
    same_completions(rl_alone, tmp_path)

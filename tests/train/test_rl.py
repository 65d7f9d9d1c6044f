"""`luthier rl` as a user starts it: what it leaves, what it says, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from luthier import cli
from luthier.algorithms import policy
from luthier.config.rl import TOOLS
from luthier.errors import UserError
from luthier.rollout import environment
from luthier.rollout.local import LocalEngine
from tiny import ROOT

pytestmark = pytest.mark.multiprocess

HERE = Path(__file__).parent
REWARDS = HERE / "rl_rewards.py"
STEPS, PROMPTS, SAMPLES, NEW = 4, 2, 4, 8
TIMES = ("seconds", "tokens_per_second")
"""How the names of numbers begin that differ from run to run."""

Rl = Callable[..., int]


def reward(*names: str) -> str:
    return str([f"{REWARDS}:{name}" for name in names])


def write_rows(path: Path, count: int = 12, first: int = 0) -> Path:
    """Write rows as GSM8K has them; each question begins with the row's letter."""
    rows = (
        {"question": f"{chr(97 + n)}: what is {n} + {2 * n}?", "answer": f"It is easy.\n#### {3 * n}"}
        for n in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rl") / "rows.jsonl")


def arguments(folder: Path, model: Path, rows: Path | None, **keys: Any) -> list[str]:
    """The arguments of a run of 4 steps on the tiny model and one device, with ``keys`` in place of its own."""
    chosen = {
        "base_output_directory": folder,
        "run_name": "run",
        "load_parameters_path": model,
        "hf_path": rows,
        "reward_functions": reward("even"),
        "reward_workers": 1,
        "steps": STEPS,
        "prompts_per_step": PROMPTS,
        "num_generations": SAMPLES,
        "max_new_tokens": NEW,
        "decode_steps": NEW // 2,
        "dtype": "float32",  # in which sampler and trainer, and one device and eight, agree closely
        "learning_rate": 1e-2,
        "log_completions_steps": 0,
        "chips_per_vm": 1,
        "jax_cache_dir": ROOT / ".cache" / "jax",
    } | keys
    return [f"{name}={value}" for name, value in chosen.items() if value is not None]


@pytest.fixture(scope="module")
def rl(tiny_model: Path, rows: Path) -> Rl:
    """Run `luthier rl` in this process with the keys of ``arguments``, and return its exit code."""
    return lambda folder, **keys: cli.main(["rl", *arguments(folder, tiny_model, rows, **keys)])


def metrics(folder: Path, *, evaluations: bool = False) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if ("loss" not in row) == evaluations]


def completions(folder: Path, number: int) -> list[dict[str, Any]]:
    text = (folder / "run" / "rollouts" / f"step-{number:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.strip("\n").split("\n")]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "run" / "checkpoints").glob("*") if path.name.isdigit())


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All numbers of a run that follow from its keys."""
    both = metrics(folder) + metrics(folder, evaluations=True)
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in both]


def same_run(one: Path, other: Path) -> None:
    """Numbers, completions with their rewards, and weights of two runs agree bit for bit."""
    assert numbers(one) == numbers(other)
    for number in range(1, STEPS + 1):
        assert completions(one, number) == completions(other, number)
    same_weights(one, other)


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


HELD_OUT = {"train_split": "train[:9]", "hf_eval_split": "train[9:]", "eval_num_generations": 2, "eval_interval": 2}
WHOLE = HELD_OUT | {"checkpoint_period": 2, "beta": 0.1, "temperature": 0.7, "log_completions_steps": 4}


@pytest.fixture(scope="module")
def whole(rl: Rl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped, with its output beside it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, (folder / "output").open("w") as output:
        patch.setattr(sys, "stdout", output)
        assert rl(folder, **WHOLE) == 0
    return folder


def test_a_run_leaves_a_row_of_numbers_for_each_step(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row.keys() >= {
            *("loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "kl", "reward", "reward_std"),
            *("rewards/even/mean", "rewards/even/std", "frac_reward_zero_std", "completions/mean_length"),
            *("completions/clipped_ratio", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
            *("sampling/logp_difference/mean", "sampling/logp_difference/max", "sampling/kl"),
            *("sampling/importance_ratio/mean", "seconds/sampling", "seconds/reward", "seconds/training"),
        }
        assert "entropy" not in row
        assert all(np.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0


def test_kl_is_nothing_before_the_policy_has_moved_and_something_after(whole: Path) -> None:
    kl = [row["kl"] for row in metrics(whole)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert min(kl[1:]) > 1e-3


def test_sampler_and_trainer_agree_at_a_temperature(whole: Path) -> None:
    for row in metrics(whole):
        assert row["sampling/logp_difference/max"] < 1e-4
        assert row["sampling/importance_ratio/mean"] == pytest.approx(1, abs=1e-4)


def test_every_completion_is_written_down_with_its_rewards_and_advantage(whole: Path) -> None:
    for row in metrics(whole):
        lines = completions(whole, row["step"])
        assert len(lines) == PROMPTS * SAMPLES
        assert {line["finish_reason"] for line in lines} <= {"stop", "length"}
        assert np.mean([line["reward"] for line in lines]) == pytest.approx(row["reward"])
        assert np.mean([line["completion_tokens"] for line in lines]) == pytest.approx(row["completions/mean_length"])
        for group in (lines[:SAMPLES], lines[SAMPLES:]):
            assert len({line["place"] for line in group}) == 1
            assert [line["sample"] for line in group] == list(range(SAMPLES))
            rewards_G = np.array([line["rewards"]["even"] for line in group])
            expected_G = (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + 1e-4)
            np.testing.assert_allclose([line["advantage"] for line in group], expected_G, rtol=1e-6)
            assert all(line["trained"] and not line["failures"] for line in group)
            assert all(line["policy_versions"] == [row["step"] - 1] * 2 for line in group)
    assert np.std([line["reward"] for line in completions(whole, 1)]) > 0
    assert "what is" in str(completions(whole, 1)[0]["prompt"])
    assert "####" in completions(whole, 1)[0]["reference"]


def test_held_out_prompts_are_looked_at_before_on_the_way_and_after(whole: Path) -> None:
    evaluations = metrics(whole, evaluations=True)
    assert [row["step"] for row in evaluations] == [0, 2, STEPS]
    for row in evaluations:
        for measure in ("mean", "pass@1", "pass@2", "maj@2"):
            name = f"eval/rewards/even/{measure}"
            assert row[f"{name}/low"] <= row[name] <= row[f"{name}/high"]
    assert evaluations[0] != evaluations[1] | {"step": 0}


def test_a_run_leaves_checkpoints_its_keys_and_a_model_that_opens_again(whole: Path, rl: Rl, tmp_path: Path) -> None:
    here = whole / "run"
    assert saved_steps(whole) == [STEPS]
    assert yaml.safe_load((here / "config.yml").read_text())["beta"] == WHOLE["beta"]
    saved = {path.name for path in (here / "model").iterdir()}
    assert saved >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert list((here / "tensorboard").glob("events*"))
    # The first evaluation of a run that starts from it says what the last one of this run said.
    keys = WHOLE | {"load_parameters_path": here / "model", "steps": 1, "eval_interval": -1, "beta": 0}
    assert rl(tmp_path, **keys) == 0
    last, first = metrics(whole, evaluations=True)[-1], metrics(tmp_path, evaluations=True)[0]
    assert first == last | {"step": 0}


def test_the_user_sees_what_is_trained_and_what_came_of_it(whole: Path) -> None:
    output = (whole / "output").read_text()
    for words in (
        *("luthier rl", "1 x cpu", "GiB", "9 of", "3 prompts", "even", "grpo", "beta 0.1", "advantages group-std"),
        *(f"{PROMPTS} prompts x {SAMPLES} completions of at most {NEW} tokens", f"{STEPS} steps of adamw"),
        *("step 1/4", f"step {STEPS}/{STEPS}", "reward 0.", "mismatch", "best of step 4", "worst of step 4"),
        *("held-out prompts at step 0", "held-out rewards/even/mean", "before", "after", str(whole / "run" / "model")),
    ):
        assert words in output
    assert "Warning" not in output


def test_the_recipe_that_a_run_leaves_repeats_it(whole: Path, tmp_path: Path) -> None:
    recipe = whole / "run" / "config.yml"
    assert cli.main(["rl", str(recipe), f"base_output_directory={tmp_path}"]) == 0
    same_run(whole, tmp_path)


def test_the_same_command_on_a_finished_run_trains_nothing(whole: Path, rl: Rl) -> None:
    before = metrics(whole), metrics(whole, evaluations=True), completions(whole, STEPS)
    assert rl(whole, **WHOLE) == 0
    assert (metrics(whole), metrics(whole, evaluations=True), completions(whole, STEPS)) == before


# Each algorithm with keys that take it another way through the loop, and a number that must then be logged.
ALGORITHMS: dict[str, tuple[dict[str, Any], str]] = {
    "grpo": ({"log_entropy": True}, "entropy"),
    "dr-grpo": ({"num_iterations": 2, "num_mini_batches": 2}, "clip_ratio/region_mean"),
    "dapo": ({"max_resamples": 1}, "clip_ratio/high_mean"),
    "gspo": ({"num_mini_batches": 2}, "clip_ratio/region_mean"),
    "gspo-token": ({"num_iterations": 2}, "clip_ratio/region_mean"),
    "cispo": ({"importance_sampling_correction": "token"}, "clip_ratio/high_mean"),
    "rloo": ({"entropy_coefficient": 0.01}, "entropy"),
    "reinforce": ({"num_generations": 1, "prompts_per_step": 4}, "ratio/mean"),
}


@pytest.mark.parametrize("name", policy.ALGORITHMS)
def test_every_algorithm_takes_a_step(name: str, rl: Rl, tmp_path: Path) -> None:
    keys, logged = ALGORITHMS[name]
    assert rl(tmp_path, loss_algo=name, steps=1, enable_checkpointing=False, **keys) == 0
    (row,) = metrics(tmp_path)
    assert logged in row
    assert row["grad_norm"] > 0
    assert all(np.isfinite(value) for value in row.values())
    assert row["sampling/logp_difference/max"] < 1e-4


@pytest.mark.slow
def test_every_kind_of_model_samples_trains_and_goes_on(
    other_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense layers with windows, experts, and latent attention; the sampler agrees with the trainer all along."""
    keys = {"checkpoint_period": 100, "lr_schedule_type": "constant", "warmup_steps_fraction": 0}
    keys |= {} if "gemma3" in other_model.name else {"load_balance_loss_weight": 0.01}
    assert cli.main(["rl", *arguments(tmp_path, other_model, rows, **keys, steps=1)]) == 0
    assert cli.main(["rl", *arguments(tmp_path, other_model, rows, **keys, steps=2)]) == 0
    assert "Going on after step 1 of 2" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    for row in metrics(tmp_path):
        assert row["grad_norm"] > 0
        assert row["sampling/logp_difference/max"] < 1e-4
        assert all(np.isfinite(value) for value in row.values())
    before, after = (load_file(folder / "model.safetensors") for folder in (other_model, tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    unmoved = {name for name in before if np.array_equal(before[name], after[name])}
    # No token may have been sent to an expert.
    assert {name for name in unmoved if ".experts." not in name} == {name for name in before if "correction" in name}


def test_several_updates_clip_what_the_first_ones_moved(rl: Rl, tmp_path: Path) -> None:
    keys = {"num_iterations": 2, "num_mini_batches": 2, "steps": 1, "enable_checkpointing": False}
    assert rl(tmp_path, **keys) == 0
    (row,) = metrics(tmp_path)
    assert row["clip_ratio/region_mean"] > 0
    lines = completions(tmp_path, 1)
    # Those of no advantage weigh, but are not computed.
    assert row["num_trained_tokens"] == 2 * sum(line["completion_tokens"] for line in lines if line["advantage"])
    # The sampler is held against the policy before the first of the updates, which is the one that it sampled from.
    assert row["sampling/logp_difference/max"] < 1e-4


def test_groups_that_are_all_alike_can_be_dropped_and_a_step_without_any_changes_nothing(
    rl: Rl, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"reward_functions": reward("constant"), "zero_variance_groups": "drop", "steps": 1}
    assert rl(tmp_path, **keys) == 0
    (row,) = metrics(tmp_path)
    assert (row["num_groups"], row["frac_reward_zero_std"], row["grad_norm"]) == (0, 1, 0)
    assert all(np.isfinite(value) for value in row.values())
    assert not any(line["trained"] for line in completions(tmp_path, 1))
    output = capsys.readouterr().out
    assert "no completion is trained on" in output
    assert "2 of 2 groups" in output
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    for name in before:
        np.testing.assert_array_equal(after[name], before[name].astype(after[name].dtype))


def test_bad_reward_functions_cost_their_own_rewards_and_not_the_run(
    rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("even", "raises", "not_finite", "too_few", "hangs")
    keys = {"reward_timeout": 1, "reward_workers": 2, "max_reward_failures": 1, "steps": 1}
    assert rl(tmp_path, reward_functions=reward(*names), **keys) == 0
    (row,) = metrics(tmp_path)
    every = PROMPTS * SAMPLES
    lost = {"raises": every, "not_finite": PROMPTS, "too_few": every, "hangs": every}
    assert row["rewards/failed"] == sum(lost.values())
    assert row["rewards/missing"] == pytest.approx(sum(lost.values()) / (every * len(names)))
    lines = completions(tmp_path, 1)
    for name, count in lost.items():
        assert sum(line["rewards"][name] is None for line in lines) == count
        assert all(any(failure.startswith(f"{name} ") for failure in line["failures"]) for line in lines)
    assert all(isinstance(line["rewards"]["even"], float) and line["trained"] for line in lines)
    output = capsys.readouterr().out
    assert f"step 1: {sum(lost.values())} rewards failed. The first: " in output
    assert "no idea" in output
    assert "rl_rewards.py, line" in output


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"reward_functions": reward("raises")}, ["`raises` failed for 8 of 8", "max_reward_failures=0.5", "no idea"]),
        ({"reward_functions": reward("even", "raises")}, ["`raises` failed for 8 of 8", "max_reward_failures=0.5"]),
        ({"reward_functions": reward("nothing")}, ["not one of 8 completions has a reward", "gave None", "nothing"]),
        (
            {"learning_rate": 1e38, "opt_type": "sgd", "gradient_clipping_threshold": 0},
            ["step 2: ", "rollouts", "learning_rate"],
        ),
    ],
    ids=["failing", "one-of-two-failing", "none", "not-finite"],
)
def test_a_run_that_cannot_go_on_says_why(
    keys: dict[str, Any], words: list[str], rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(tmp_path, checkpoint_period=1, **keys) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert completions(tmp_path, 1)  # which say more
    assert not (tmp_path / "run" / "model").exists()
    assert saved_steps(tmp_path) == ([1] if "learning_rate" in keys else [])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"chips_per_vm": 3}, ["chips_per_vm=3", "does not divide the 8 devices", "divisor of 8"]),
        ({"num_generations": 1}, ["num_generations=1", "at least 2", "reinforce"]),
        (
            {"num_generations": 1, "loss_algo": "reinforce", "zero_variance_groups": "drop"},
            ["zero_variance_groups=drop", "num_generations=1"],
        ),
        ({"reward_weights": [1, 2]}, ["reward_weights has 2 numbers for 1 rewards"]),
        ({"reward_weights": [1, 2], "environment": "calculator", "reward_functions": []}, ["2 numbers for 1 rewards"]),
        ({"loss_algo": "rloo", "epsilon_high": 0.3}, ["epsilon_high=0.3", "rloo has no such setting", "beta"]),
        ({"loss_algo": "gspo", "loss_aggregation": "token"}, ["loss_aggregation=token", "gspo has no such setting"]),
        ({"reward_functions": "['mth']"}, ["reward_functions=mth", "Did you mean `math`"]),
        ({"reward_functions": reward("absent")}, ["rl_rewards.py", "absent"]),
        ({"reward_functions": reward("wants_a_column")}, ["wants_a_column", "`difficulty`", "question"]),
        ({"environment": "abacus"}, ["environment=abacus", "calculator"]),
        ({"max_prompt_length": 3}, ["no prompt of at most 3 tokens", "max_prompt_length"]),
        ({"row_length": 20}, ["row_length=20", "longest prompt", "max_prompt_length"]),
        ({"num_mini_batches": 3}, ["num_mini_batches=3", "prompts_per_step=2"]),
        ({"max_target_length": 8}, ["max_new_tokens=8", "max_target_length=8"]),
        ({"max_target_length": 32}, ["no prompt of at most 24 tokens", "lower max_new_tokens=8", "32 tokens"]),
        ({"max_new_tokens": 512}, ["max_new_tokens=512", "512 tokens that the model was made for"]),
        ({"max_staleness": 1}, ["max_staleness=1", "of 1 the fractions give them 0 and 0"]),
        ({"max_staleness": 1, "sampler_devices_fraction": 0.8}, ["sampler_devices_fraction=0.8", "at most 1"]),
        ({"ici_fsdp_parallelism": 4}, ["ici_fsdp_parallelism=4", "1 are here"]),
        ({"hf_path": None}, ["openai/gsm8k", "hf_path"]),
        ({"prompts_per_stp": 3}, ["unknown key `prompts_per_stp`", "prompts_per_step"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_refused_in_one_message_before_anything_expensive(
    keys: dict[str, Any],
    words: list[str],
    rl: Rl,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("luthier.train.rl.load", lambda *_: pytest.fail("weights were read"))
    assert rl(tmp_path, **keys) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("luthier rl: ")
    for word in words:
        assert word in said
    assert not (tmp_path / "run" / "model").exists()


def test_the_built_in_environments_are_known_to_reward_nothing() -> None:
    assert set(TOOLS) == set(environment.BUILT_IN)


@pytest.mark.slow
def test_a_tool_is_trained_with_by_the_rewards_of_functions(rl: Rl, tmp_path: Path) -> None:
    keys = {"environment": "calculator", "reward_functions": reward("even"), "max_turns": 2, "steps": 1}
    assert rl(tmp_path, enable_checkpointing=False, **keys) == 0
    (row,) = metrics(tmp_path)
    assert {name for name in row if name.endswith("/std")} == {"rewards/even/std"}
    assert row["rewards/missing"] == 0


def test_long_prompts_are_left_out_and_said(rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rl(tmp_path, max_prompt_length=36, steps=1, enable_checkpointing=False) == 0
    output = capsys.readouterr().out
    assert "of 12 prompts have over 36 tokens, and are left out" in output
    assert max(line["prompt_tokens"] for line in completions(tmp_path, 1)) <= 36


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(whole: Path, rl: Rl, tmp_path: Path) -> None:
    keys = WHOLE | {"chips_per_vm": 8, "steps": 2, "hf_eval_split": None}
    assert rl(tmp_path, **keys) == 0
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=False):
        for name in ("loss", "grad_norm", "kl", "reward", "completions/mean_length", "sampling/importance_ratio/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for ours, theirs in zip(completions(tmp_path, 1), completions(whole, 1), strict=True):
        assert ours["completion"] == theirs["completion"]
        assert ours["rewards"] == theirs["rewards"]


@pytest.mark.slow
def test_the_command_of_another_library_works_as_it_is(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    command = [
        *(sys.executable, "-m", "luthier.train.rl", "model_name=llama3.1-8b", f"load_parameters_path={tiny_model}"),
        *("run_name=run", f"base_output_directory={tmp_path}", "loss_algo=gspo-token", "chips_per_vm=2"),
    ]
    others = {"hf_path": f"{rows}", "steps": 1, "num_generations": 2, "max_new_tokens": 4, "prompts_per_step": 2}
    others |= {"reward_functions": reward("even"), "jax_cache_dir": ROOT / ".cache" / "jax"}
    environment = {
        **os.environ,
        **{f"LUTHIER_{name.upper()}": str(value) for name, value in others.items()},
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "gspo-token" in done.stdout
    assert "2 x cpu" in done.stdout
    assert metrics(tmp_path)[0]["grad_norm"] > 0


# Killed, stopped, resumed.


def signalling(folder: Path, at: str, number: str) -> dict[str, Any]:
    """Keys of a run that is sent a signal while the rewards of a question are computed, the first time."""
    settings = {"signals": {"marker": str(folder / "marker"), "at": at, "number": number}}
    return WHOLE | {"reward_functions": reward("signals"), "reward_kwargs": json.dumps(settings)}


def without_names(value: Any) -> Any:
    """Return numbers or lines of completions with the name of the reward taken out."""
    return json.loads(json.dumps(value).replace("signals", "even"))


def goes_on_the_same(whole: Path, folder: Path) -> None:
    """Numbers and completions of a run that was broken off are those of one that was not, bit for bit."""
    assert without_names(numbers(folder)) == numbers(whole)
    for number in range(1, STEPS + 1):
        assert without_names(completions(folder, number)) == completions(whole, number)
    same_weights(whole, folder)


def question_of_step(whole: Path, number: int) -> str:
    """Return the letter of a question that the run asks in that step alone."""
    return completions(whole, number)[0]["prompt"][0]


def killed(folder: Path, place: str, count: int, *command: str) -> None:
    """Run until it is killed at a place."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, str(HERE / "rl_killed.py"), place, str(count), *command],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "run" / "model").exists()


def test_killed_while_rewards_are_computed_it_resumes_to_the_same(
    whole: Path, rl: Rl, tmp_path: Path, tiny_model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = signalling(tmp_path, question_of_step(whole, 4), "SIGKILL")
    killed(tmp_path, "nowhere", 0, *arguments(tmp_path, tiny_model, rows, **keys))
    assert saved_steps(tmp_path) == [2]
    assert len(metrics(tmp_path)) == 3
    assert rl(tmp_path, **keys) == 0
    assert f"Going on after step 2 of {STEPS}" in capsys.readouterr().out
    goes_on_the_same(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count", "steps", "saved"),
    [
        # A step draws two chunks of tokens, since its prompts do not begin together, and so does an evaluation.
        ("sampling", 9, 2, [2]),
        ("saving", 1, 2, []),
        ("saving", 2, 4, [2]),
    ],
)
def test_killed_while_sampling_or_saving_it_resumes_to_the_same(
    place: str, count: int, steps: int, saved: list[int],
    whole: Path, rl: Rl, tmp_path: Path, tiny_model: Path, rows: Path,
) -> None:  # fmt: skip
    killed(tmp_path, place, count, *arguments(tmp_path, tiny_model, rows, **WHOLE))
    assert len(metrics(tmp_path)) == steps
    assert saved_steps(tmp_path) == saved
    assert len(list((tmp_path / "run" / "checkpoints").glob("*tmp*"))) == (place == "saving")  # what is half written
    assert rl(tmp_path, **WHOLE) == 0
    goes_on_the_same(whole, tmp_path)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: str, code: int, whole: Path, rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = signalling(tmp_path, question_of_step(whole, 3), number) | {"checkpoint_period": 1000}
    with pytest.raises(SystemExit) as stopped:
        rl(tmp_path, **keys)
    assert stopped.value.code == code
    assert f"Stopped by {number} after step 3. Saved" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [3]
    assert rl(tmp_path, **keys) == 0
    assert f"Going on after step 3 of {STEPS}" in capsys.readouterr().out
    goes_on_the_same(whole, tmp_path)


@pytest.mark.slow
def test_a_signal_in_the_last_step_leaves_the_rest_to_the_same_command(whole: Path, rl: Rl, tmp_path: Path) -> None:
    keys = signalling(tmp_path, question_of_step(whole, STEPS), "SIGTERM")
    with pytest.raises(SystemExit):
        rl(tmp_path, **keys)
    assert saved_steps(tmp_path) == [STEPS]
    assert rl(tmp_path, **keys) == 0
    goes_on_the_same(whole, tmp_path)  # the last evaluation and the model included


def test_other_prompts_under_the_same_name_are_refused(
    rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    assert rl(tmp_path, hf_path=rows, steps=1) == 0
    write_rows(rows, first=1)
    assert rl(tmp_path, hf_path=rows, steps=2) == 2
    said = capsys.readouterr().err
    assert "the prompts are not those that the run was begun with" in said
    assert "run_name" in said
    write_rows(rows)
    assert rl(tmp_path, hf_path=rows, steps=2, learning_rate=1) == 2
    assert "holds a different run: learning_rate" in capsys.readouterr().err
    assert rl(tmp_path, hf_path=rows, steps=2, max_reward_failures=0.9) == 0
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert rl(tmp_path, hf_path=rows, steps=1, max_reward_failures=0.9) == 2
    assert "has taken 2 steps, and the command asks for 1" in capsys.readouterr().err


# Sampling ahead.

AHEAD = {"chips_per_vm": 2, "max_staleness": 1}


@pytest.mark.timeout(300)
def test_sampling_ahead_is_bounded_corrected_and_evaluated(
    rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(tmp_path, **HELD_OUT, **AHEAD) == 0
    for row in metrics(tmp_path):
        oldest, newest = np.array([line["policy_versions"] for line in completions(tmp_path, row["step"])]).T
        assert min(oldest) >= row["step"] - 2
        assert max(newest) <= row["step"] - 1
        assert "importance_sampling/capped" in " ".join(row)
    assert [row["step"] for row in metrics(tmp_path, evaluations=True)] == [0, 2, STEPS]
    output = capsys.readouterr().out
    assert "1 x cpu train, 1 x cpu sample, at most 1 step behind" in output
    assert "sampler corrected by token" in output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sampling_ahead_stops_saves_and_goes_on(rl: Rl, tmp_path: Path, whole: Path) -> None:
    keys = signalling(tmp_path, question_of_step(whole, 3), "SIGTERM") | AHEAD | {"beta": 0}
    with pytest.raises(SystemExit) as stopped:
        rl(tmp_path, **keys)
    assert stopped.value.code == 143
    assert saved_steps(tmp_path)[0] in (1, 2, 3)
    assert rl(tmp_path, **keys) == 0
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.timeout(300)
def test_what_goes_wrong_while_sampling_ahead_reaches_the_user(
    rl: Rl, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("the cache is full")

    monkeypatch.setattr(LocalEngine, "submit", full)
    assert rl(tmp_path, **AHEAD) == 2
    assert "the cache is full" in capsys.readouterr().err

"""Rewards make a model better: what a tiny one lacks after a little SFT, it learns by being rewarded alone.

Accuracy is that of the policy as it is trained, at temperature 1: the share of 500 held-out problems to which the first
completion drawn is right, its end included. Sums of two digits are 200 problems in all, so the held-out ones were seen
in training: that rewards reach the weights is shown here, not that anything generalises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, tiny.needs_reasoning_gym]

ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
TASK = "reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"
PREFACE = "State the final answer to the following arithmetic problem:"
"""What is the same in all problems; it is made one token, so that prompts have 9."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"  # fmt: skip  # noqa: E501
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8,
         "num_key_value_heads": 8, "max_position_embeddings": 128}  # fmt: skip

SFT = ("steps=75", "learning_rate=2e-3", "lr_schedule_type=constant", "max_target_length=128",
       "per_device_batch_size=8")  # fmt: skip
RL = (
    *("prompts_per_step=64", "num_generations=16", "max_new_tokens=3", "row_length=64", "per_device_batch_size=16"),
    *("learning_rate=7e-4", "lr_schedule_type=linear", "warmup_steps_fraction=0.1", "adam_b2=0.95"),
    *("max_num_seqs=256", "decode_steps=3", "remat_policy=none", "reward_workers=1", "log_completions_steps=0"),
)
UPDATES = {"grpo": "num_mini_batches=2", "gspo-token": "num_mini_batches=4"}
"""Updates on a step's completions: more than one, or GSPO's gradient would be that of GRPO."""
ACCURACY = "eval/rewards/reasoning_gym/pass@1"


def run(command: str, model: Path, folder: Path, *keys: str) -> list[dict[str, float]]:
    """Train ``model`` in ``folder`` and return the lines of the run's metrics."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "luthier", command, f"load_parameters_path={model}", f"hf_path={TASK}"),
            *("hf_eval_split=test", "enable_checkpointing=false", f"base_output_directory={folder}", "run_name=run"),
            *(f"jax_cache_dir={ROOT / '.cache' / 'jax'}", *keys),
        ],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def accuracies(rows: list[dict[str, float]]) -> tuple[float, float]:
    """Return the accuracy before and after."""
    before, after = (row[ACCURACY] for row in rows if ACCURACY in row)
    return before, after


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that SFT from random weights has taught some of the task."""
    folder = tmp_path_factory.mktemp("taught")
    tiny.write_model(folder / "random", **SIZES)
    tokenizer = tiny.tokenizer(TEMPLATE)
    tokenizer.add_tokens([PREFACE])
    tokenizer.save_pretrained(folder / "random")
    run("sft", folder / "random", folder, *SFT)
    return folder / "run" / "model"


def both(model: Path, folder: Path, *keys: str) -> dict[str, list[dict[str, float]]]:
    """Train by both algorithms, side by side, and return the metrics of each."""

    def by(algorithm: str) -> list[dict[str, float]]:
        return run("rl", model, folder / algorithm, f"loss_algo={algorithm}", UPDATES[algorithm], *RL, *keys)

    with ThreadPoolExecutor(len(UPDATES)) as pool:
        return dict(zip(UPDATES, pool.map(by, UPDATES), strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_teach_what_sft_left_out(taught: Path, tmp_path: Path, seed: int) -> None:
    for algorithm, rows in both(taught, tmp_path, "steps=90", f"seed={seed}").items():
        before, after = accuracies(rows)
        assert 0.2 < before < 0.6
        assert after > 0.9, algorithm
        last = next(row for row in reversed(rows) if "reward" in row)
        assert last["completions/clipped_ratio"] < 0.02, algorithm
        assert last["sampling/logp_difference/max"] < 1e-3, algorithm


def test_negated_rewards_unteach_it(taught: Path, tmp_path: Path) -> None:
    for algorithm, rows in both(taught, tmp_path, "steps=15", "reward_weights=[-1]").items():
        before, after = accuracies(rows)
        assert after < before / 2, algorithm

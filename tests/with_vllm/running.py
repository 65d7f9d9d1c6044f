"""`luthier rl` over vLLM's servers, as the tests here run it: a real model, questions, a reward that can be learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import folders
import httpx
import psutil

import tiny

BOUND = 0.02
"""What log-probs of sampler and trainer may differ by on average where both have the same weights in fp32."""
START_SECONDS = 400
"""A server imports torch and vLLM first, which on a busy machine takes over a minute."""
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(tiny.ROOT), "OMP_WAIT_POLICY": "passive"}
SERVER = ("max_num_seqs=16", "kv_cache_gib=1", "vllm_arguments=--enforce-eager")
"""What makes a server small and quick to start."""
REWARD = f"{tiny.ROOT / 'tests' / 'train' / 'rl_rewards.py'}:even"
"""The share of even tokens: it differs within groups from the first step on."""
QUESTIONS = (
    "What is the capital of France?", "Name three colours of the rainbow.", "What is 2 + 3?", "Who wrote Hamlet?",
    "Why is the sky blue?", "Tell me a joke.", "What do bees make?", "Name a river in Africa.",
)  # fmt: skip
KEYS = (
    *(f"reward_functions=[{REWARD}]", "prompts_per_step=2", "num_generations=8", "max_new_tokens=16"),
    *("ignore_eos=true", "num_epoch=1000", "learning_rate=3e-5", "dtype=float32", "enable_checkpointing=false"),
    *("reward_workers=1", "log_completions_steps=0", f"max_logp_difference={BOUND}", "rollout_engine=vllm"),
    *("vllm_wait=400", f"jax_cache_dir={tiny.ROOT / '.cache' / 'jax'}"),
)


@dataclass(frozen=True)
class Ran:
    """A finished run: its exit code, the rows of its metrics, and what it printed."""

    code: int
    rows: list[dict[str, float]]
    output: str

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    @property
    def differences(self) -> list[float]:
        """The mean absolute difference of sampler's and trainer's log-probs, step by step."""
        return self.column("sampling/logp_difference/mean")


Meddle = Callable[[psutil.Process, int], None]


class Train(Protocol):
    def __call__(self, *keys: str, program: tuple[str, ...] = ..., meddle: Meddle | None = None) -> Ran: ...


def train(folder: Path, keys: tuple[str, ...], program: tuple[str, ...], meddle: Meddle | None, seconds: float) -> Ran:
    """Run ``program`` with the keys above and ``keys``, and return what came of it.

    ``meddle`` is called with the process and the number of steps that are done, again and again while it runs.
    """
    rows, metrics, log = folder / "questions.jsonl", folder / "run" / "metrics.jsonl", folder / "log"
    rows.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": each}]}) + "\n" for each in QUESTIONS))
    command = [
        *(sys.executable, *program, f"load_parameters_path={folders.smollm2()}", *KEYS, f"hf_path={rows}"),
        *(f"base_output_directory={folder}", "run_name=run", *keys),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)

    def over() -> bool:
        if meddle is not None and process.poll() is None:
            meddle(psutil.Process(process.pid), len(_lines(metrics)))
        return process.poll() is not None

    try:
        wait_for(over, seconds)
    finally:
        process.terminate()
        process.wait(60)
    return Ran(process.returncode, [json.loads(line) for line in _lines(metrics)], log.read_text())


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not over after {seconds} s"
        time.sleep(0.2)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []

"""Train the same model on the same data with the embedded engine and with vLLM's, and print both reward curves.

    python benchmarks/curves.py --model SmolLM2-135M-Instruct.Q4_1.gguf --vllm-python /path/to/its/python

Both take the same prompts in the same order from the same seeds. Their draws differ, since their generators do, so that
curves agree within the noise of sampling and no better: the last column is the mean difference over some steps, with
its standard error over seeds, since a run that is ahead stays so for a while and its steps do not count one by one.
The reward is the share of even tokens, which every model can learn in a few steps. Further `key=value` arguments are
for `luthier rl`, on both sides.

Left out on purpose: speed (`rl.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rl_rewards import even_tokens
from sft import hardware

HERE = Path(__file__).resolve().parent
ENGINES = ("local", "vllm")
TOPICS = ("rivers", "bees", "bread", "the moon", "glass", "chess", "rain", "trains", "salt", "maps", "wool", "tides")
FORMS = ("Tell me about {}.", "Why do people care about {}?", "Write one line on {}.", "What is strange about {}?")
KEYS = (
    *("prompts_per_step=2", "num_generations=8", "max_new_tokens=16", "ignore_eos=true", "learning_rate=3e-5"),
    *("dtype=float32", "enable_checkpointing=false", "log_completions_steps=0", "reward_workers=1", "num_epoch=1000"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder or file with a model")
    add("--vllm-python", default=sys.executable, help="the interpreter of the environment that has vLLM")
    add("--vllm-keys", default="vllm_arguments=--enforce-eager", help="key=value for its side alone, between spaces")
    add("--engines", default=",".join(ENGINES))
    add("--steps", type=int, default=30)
    add("--seeds", default="0", help="a run of each engine for each")
    add("--window", type=int, default=5, help="steps in a row of the table")
    add("--output", default="", help="a folder to keep the runs in; those that are there already are not run again")
    add("keys", nargs="*", help="further key=value of luthier rl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.output or name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        curves = {
            engine: np.array([curve(options, folder, engine, seed) for seed in seeds])
            for engine in options.engines.split(",")
        }
    print_table(curves, options.window)
    print(f"{Path(options.model).name}, seeds {options.seeds}, {' '.join([*KEYS, *options.keys])}; {hardware()}")


def curve(options: argparse.Namespace, folder: Path, engine: str, seed: int) -> list[float]:
    """Return the rewards of a run's steps."""
    rows, run = folder / "rows.jsonl", folder / f"{engine}-{seed}"
    rows.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions()))
    metrics = run / "metrics.jsonl"
    if not metrics.exists() or len(rewards(metrics)) < options.steps:
        own = ["rollout_engine=vllm", f"vllm_python={options.vllm_python}", *options.vllm_keys.split()]
        own = own if engine == "vllm" else []
        command = [
            *(sys.executable, "-m", "luthier", "rl", f"load_parameters_path={options.model}", f"hf_path={rows}"),
            *(f"reward_functions=[{HERE / 'rl_rewards.py'}:{even_tokens.__name__}]", f"base_output_directory={folder}"),
            *(f"run_name={run.name}", f"steps={options.steps}", f"seed={seed}", *KEYS, *own, *options.keys),
        ]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, check=True)
    return rewards(metrics)[: options.steps]


def questions() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": form.format(topic)}] for topic in TOPICS for form in FORMS]


def rewards(metrics: Path) -> list[float]:
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["reward"] for line in lines if "reward" in line]


def print_table(curves: dict[str, np.ndarray], window: int) -> None:
    """Print the mean reward of each engine over windows of steps, and how far apart the two are."""
    print("| steps | " + " | ".join(curves) + " | difference |\n" + "| --- " * (len(curves) + 2) + "|")
    steps = min(rewards_RS.shape[1] for rewards_RS in curves.values())
    for start in range(0, steps, window):
        parts = [rewards_RS[:, start : start + window] for rewards_RS in curves.values()]
        means = " | ".join(f"{part.mean():.3f}" for part in parts)
        print(f"| {start + 1} to {min(start + window, steps)} | {means} | {difference(parts)} |")


def difference(parts: Sequence[np.ndarray]) -> str:
    """Return the second engine's mean reward less the first one's, and the standard error of that over seeds."""
    if len(parts) < 2:
        return ""
    apart_R = (parts[1] - parts[0]).mean(axis=1)
    error = apart_R.std(ddof=1) / np.sqrt(apart_R.size) if apart_R.size > 1 else float("nan")
    return f"{apart_R.mean():+.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()

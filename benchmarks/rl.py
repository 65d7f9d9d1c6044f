"""Take GRPO steps with Luthier and with TRL's `GRPOTrainer` in turns, and print how long a step takes, and what of it.

    python benchmarks/rl.py --peer-python /path/to/an/environment/with/trl/bin/python

Both sample groups of the same prompts from SmolLM2's shape, all completions of one length whatever token comes, reward
them by the same function that does no work, and take one update of AdamW on all of them. Both processes stay alive,
loaded and compiled; in each round each takes a step while the other waits, and their order is turned over every round.
The ratio is taken round by round, and its median is the result. A case is a length of prompts: the longer they are, the
more it is worth to read one once for its group, in sampling and in training.

TRL is met as it is by default (`default`: gradient checkpointing, 8 completions at a time) and as it is fastest here
(a number: no checkpointing, so many completions at a time). With `--engine vllm`, Luthier samples with a vLLM server of
its own, and the seconds are told that a GB of new weights takes to get there (`sync.py` looks closer).

Left out on purpose: starting up and compiling (`startup.py`), and how fast anything learns, which is the same for the
same update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np
import smollm2
from sft import GIB, hardware, listed, pairs
from turns import Worker

HERE = Path(__file__).resolve().parent
PARTS = ("sampling", "reward", "training", "sync")
GB = 1e9
FRAME = 5
"""Tokens that the chat template puts around a question."""
Turn = dict[str, Any]


def main() -> None:
    options = read_options()
    sys.stdout.reconfigure(line_buffering=True)  # rows appear as they are measured, in a file too
    settings = peers(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smollm2.write_model(folder / "model")
        smollm2.write_weights(folder / "model")
        for prompt in map(int, options.prompt.split(",")):
            write_prompts(folder / f"rows-{prompt}.jsonl", prompt)
            measure(options, folder, prompt, settings)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="what both sides compute in")
    add("--peer-settings", default="default,32", help="of TRL: default, or completions at a time; empty: Luthier alone")
    add("--peer-python", default=sys.executable, help="the interpreter of the environment that has TRL")
    add("--peer-only", action="store_true", help="without Luthier, to find the settings that are fastest")
    add("--engine", default="local", choices=("local", "vllm"), help="what Luthier samples with")
    add("--vllm-python", default=sys.executable, help="the interpreter of the environment that has vLLM")
    add("--prompts", type=int, default=4, help="prompts in a step")
    add("--samples", type=int, default=8, help="completions of each")
    add("--prompt", default="64,400", help="tokens of a prompt: a case each")
    add("--new", type=int, default=64, help="tokens of a completion")
    add("--learning-rate", type=float, default=1e-6)
    add("--rounds", type=int, default=3)
    add("--json", default="", help="a file to add a line to for each meeting, which is printed too")
    return parser.parse_args()


def peers(options: argparse.Namespace) -> list[str]:
    """Return the settings that TRL can be met with."""
    settings = [setting for setting in options.peer_settings.split(",") if setting]
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    if settings and subprocess.run([options.peer_python, "-c", probe], check=False).returncode:
        print(f"trl: skipped, since {options.peer_python} has no trl (--peer-python chooses another)")
        return []
    return settings


def write_prompts(path: Path, length: int) -> None:
    """Write questions that come to ``length`` tokens with the chat template around them."""
    random = np.random.default_rng(length)
    drawn = random.integers(len(smollm2.SPECIALS), smollm2.CONFIG["vocab_size"], (1000, length - FRAME))
    with path.open("w") as file:
        for row in drawn:
            asked = [{"role": "user", "content": " ".join(f"w{number}" for number in row)}]
            file.write(json.dumps({"prompt": asked, "completion": "w3"}) + "\n")


def measure(options: argparse.Namespace, folder: Path, prompt: int, settings: Sequence[str]) -> None:
    """Let Luthier meet TRL with each of its settings on prompts of one length."""
    print(
        f"\nSmolLM2-135M's shape, {options.prompts} prompts of {prompt} tokens x {options.samples} completions of "
        f"{options.new}, {options.dtype}, {options.rounds} rounds of a step; {hardware()}"
    )
    luthier = None if options.peer_only else start(options, folder, "luthier", prompt)
    if luthier:
        luthier.turn(1)
        print(f"luthier ({listed(luthier.facts['versions'])})")
    for setting in settings:
        other = start(options, folder, "trl", prompt, setting)
        other.turn(1)
        workers = {"luthier": luthier, "trl": other} if luthier else {"trl": other}
        sides = rounds(options, workers)
        other.stop()
        report(options, prompt, setting, other.facts, sides)
    if luthier:
        if not settings:
            report(options, prompt, "", {}, rounds(options, {"luthier": luthier}))
        luthier.stop()


def start(options: argparse.Namespace, folder: Path, side: str, prompt: int, setting: str = "") -> Worker:
    """Start the worker of ``side`` and wait until it stands before its first step."""
    output = folder / f"{side}-{prompt}-{setting}"
    output.mkdir()
    plan = {
        "model": str(folder / "model"),
        "rows": str(folder / f"rows-{prompt}.jsonl"),
        "output": str(output),
        "dtype": options.dtype,
        "prompts": options.prompts,
        "samples": options.samples,
        "prompt": prompt,
        "new": options.new,
        "learning_rate": options.learning_rate,
        "batch": int(setting) if setting.isdecimal() else None,
        "engine": {"rollout_engine": "vllm", "vllm_python": options.vllm_python} if options.engine == "vllm" else {},
    }
    (output / "plan.json").write_text(json.dumps(plan))
    python = sys.executable if side == "luthier" else options.peer_python
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    environment["PYTHONPATH"] = str(HERE.parent)  # what is measured is the checkout that this script lies in
    # On a GPU, jax would take three quarters of the memory for itself at once.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    return Worker([python, str(HERE / f"rl_{side}.py"), str(output / "plan.json")], environment, output / "log")


def rounds(options: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, list[Turn]]:
    """Let the workers take a step in turns; return what each reports, round by round."""
    sides: dict[str, list[Turn]] = {side: [] for side in workers}
    for number in range(options.rounds):
        for side, worker in list(workers.items())[:: 1 if number % 2 == 0 else -1]:
            sides[side].append(worker.turn(1))
    return sides


def report(
    options: argparse.Namespace, prompt: int, setting: str, facts: dict[str, Any], sides: dict[str, list[Turn]]
) -> None:
    """Print the rounds, their medians and parts, and all figures as a line of JSON."""
    if setting:
        how = "its defaults" if setting == "default" else f"no checkpointing, {setting} completions at a time"
        print(f"\nagainst trl, {how} ({listed(facts['versions'])})")
    print(f"{'round':>12} " + " ".join(f"{side:>10}" for side in sides) + f" {'ratio':>8}   seconds a step")
    ratios = pairs(sides["luthier"], sides["trl"], "seconds") if len(sides) == 2 else []
    for number, turns in enumerate(zip(*sides.values(), strict=True), start=1):
        ratio = f"{ratios[number - 1]:>8.2f}" if ratios else ""
        print(f"{number:>12} " + " ".join(f"{turn['seconds']:>10.2f}" for turn in turns) + f" {ratio}")
    medians = {side: medians_of(turns) for side, turns in sides.items()}
    for name in ("seconds", *PARTS, "cpu_seconds"):
        values = [median[name] for median in medians.values()]
        ratio = f"{values[1] / values[0]:>8.2f}" if len(values) == 2 and min(values) >= 0.01 else ""
        print(f"{name:>12} " + " ".join(f"{value:>10.2f}" for value in values) + f" {ratio}")
    for side, turns in sides.items():
        if sent := turns[-1]["parts"].get("sync_bytes"):
            seconds = medians[side]["sync"]
            print(f"{'weights':>12} {sent / GB:.3f} GB sent in {seconds:.2f} s: {seconds / sent * GB:.2f} s a GB")
    peaks = " ".join(f"{turns[-1]['peak_bytes'] / GIB:>10.2f}" for turns in sides.values())
    print(f"{'peak GiB':>12} {peaks}")
    line = {"options": vars(options), "prompt": prompt, "setting": setting, "facts": facts, "turns": sides}
    line |= {"medians": medians, "ratio": statistics.median(ratios) if ratios else None}
    print(json.dumps(line))
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(json.dumps(line) + "\n")


def medians_of(turns: Sequence[Turn]) -> dict[str, float]:
    """Return the medians of a side's seconds, and of those of each part of a step."""
    totals = {name: statistics.median(turn[name] for turn in turns) for name in ("seconds", "cpu_seconds")}
    return totals | {part: statistics.median(turn["parts"].get(part, 0.0) for turn in turns) for part in PARTS}


if __name__ == "__main__":
    main()

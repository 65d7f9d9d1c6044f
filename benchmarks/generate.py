"""Sample from SmolLM2's shape with Luthier, vLLM and Transformers in turns, and print who is how fast.

    python benchmarks/generate.py --peers vllm:bfloat16,transformers:float32 --vllm-python /path/to/its/python

Each case is some prompts and some samples of each. All sides get the same prompts, which are new in every round, so
that nobody finds them in a cache, and draw as many tokens from the whole softmax, whatever token comes. Processes stay
alive, loaded and compiled; in each round one works while the other waits, and their order is turned over every round.
The ratio is taken round by round, and its median is the result. With `--engine vllm`, Luthier samples with a server of
its own (`rollout_engine=vllm`): against the peer `vllm`, that is what asking it over HTTP takes.

In every turn one more call draws a single token: that is the time of reading the prompts, and what remains is decoding.
A step of decoding has to read all weights once, so memory bandwidth over their bytes is its limit; the share of that
limit which is reached is printed. Left out on purpose: starting up and compiling (`startup.py`), and serving.
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
from sft import hardware, listed
from turns import Worker

HERE = Path(__file__).resolve().parent
GB = 1e9
Turn = dict[str, float]
"""Of one side, the seconds of reading the prompts and of all."""


def main() -> None:
    options = read_options()
    sys.stdout.reconfigure(line_buffering=True)  # rows appear as they are measured, in a file too
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smollm2.write_model(folder / "model")
        smollm2.write_weights(folder / "model")
        found = peers(options)
        for dtype in dict.fromkeys(dtype for _, dtype in found):
            luthier = start(options, folder, "luthier", dtype)
            print_header(options, luthier.facts)
            warm_up(options, luthier)
            results += [meet(options, folder, luthier, *peer) for peer in found if peer[1] == dtype]
            luthier.stop()
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "results": results}, indent=2) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--peers",
        default="vllm:bfloat16,transformers:bfloat16,transformers:float32",
        help="pairs of a peer (vllm, transformers, or none: Luthier alone) and the dtype that both sides compute in",
    )
    add("--engine", default="local", choices=("local", "vllm"), help="what Luthier samples with")
    add("--vllm-python", default=sys.executable, help="the interpreter of the environment that has vLLM")
    add("--transformers-python", default=sys.executable, help="the one that has Transformers and torch")
    add("--cases", default="1x1,8x1,32x1,1x8,4x8", help="prompts x samples of each")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    add("--new", type=int, default=128, help="tokens of a completion")
    add("--temperature", type=float, default=1.0, help="0: the likeliest token")
    add("--rounds", type=int, default=3)
    add("--json", default="", help="a file to write all figures to")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[tuple[int, int]]:
    return [(int(prompts), int(samples)) for prompts, samples in (case.split("x") for case in options.cases.split(","))]


def peers(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the (peer, dtype) pairs that can be met, and say which cannot."""
    found = []
    for peer, dtype in (pair.split(":") for pair in options.peers.split(",")):
        if peer != "none":
            python, module = python_of(options, peer), "torch" if peer == "transformers" else peer
            probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
            if subprocess.run([python, "-c", probe], check=False).returncode:
                print(f"{peer}: skipped, since {python} has no {module} (--{peer}-python chooses another)")
                continue
        found.append((peer, dtype))
    return found


def python_of(options: argparse.Namespace, side: str) -> str:
    return sys.executable if side == "luthier" else getattr(options, f"{side}_python")


def start(options: argparse.Namespace, folder: Path, side: str, dtype: str) -> Worker:
    """Start the worker of ``side`` and wait until it stands before its first call."""
    output = folder / f"{side}-{dtype}"
    output.mkdir()
    plan = {
        "model": str(folder / "model"),
        "dtype": dtype,
        "length": options.prompt + options.new,
        "prompt": options.prompt,
        "rows": max(prompts * samples for prompts, samples in cases(options)),
        "temperature": options.temperature,
        "engine": {"rollout_engine": "vllm", "vllm_python": options.vllm_python} if options.engine == "vllm" else {},
    }
    (output / "plan.json").write_text(json.dumps(plan))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    environment["PYTHONPATH"] = str(HERE.parent)  # what is measured is the checkout that this script lies in
    # On a GPU, jax would take three quarters of the memory for itself at once, and vLLM nine tenths.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    command = [python_of(options, side), str(HERE / f"generate_{side}.py"), str(output / "plan.json")]
    return Worker(command, environment, output / "log")


def prompts_of(options: argparse.Namespace, count: int, seed: Sequence[int]) -> list[list[int]]:
    drawn = np.random.default_rng(seed).integers(
        len(smollm2.SPECIALS), smollm2.CONFIG["vocab_size"], (count, options.prompt)
    )
    return drawn.tolist()


def warm_up(options: argparse.Namespace, worker: Worker) -> None:
    """Let a side compile whatever it compiles for each case."""
    for prompts, samples in cases(options):
        take(options, worker, prompts, samples, seed=(1, prompts, samples))


def take(options: argparse.Namespace, worker: Worker, prompts: int, samples: int, seed: Sequence[int]) -> Turn:
    """Let a side take one turn: a call for a single token of each sample, and one for all, of other prompts."""
    one = worker.turn(1, prompts=prompts_of(options, prompts, (*seed, 1)), samples=samples, new=1)
    all_new = worker.turn(1, prompts=prompts_of(options, prompts, (*seed, 2)), samples=samples, new=options.new)
    return {"reading": one["seconds"], "all": all_new["seconds"]}


def meet(options: argparse.Namespace, folder: Path, luthier: Worker, peer: str, dtype: str) -> dict[str, Any]:
    """Alternate Luthier with one peer over all cases, print the rounds, and return all figures."""
    other = None
    if peer != "none":
        other = start(options, folder, peer, dtype)
        warm_up(options, other)
        print(f"\nagainst {peer} {other.facts['dtype']} ({listed(other.facts['versions'])})")
    measured = []
    for prompts, samples in cases(options):
        sides: dict[str, list[Turn]] = {"luthier": [], peer: []} if other else {"luthier": []}
        workers = [("luthier", luthier), (peer, other)] if other else [("luthier", luthier)]
        for number in range(options.rounds):
            for side, worker in workers if number % 2 == 0 else reversed(workers):
                sides[side].append(take(options, worker, prompts, samples, seed=(2, number, prompts, samples)))
        print_case(options, luthier.facts, prompts, samples, sides)
        measured.append({"prompts": prompts, "samples": samples, "turns": sides})
    if other:
        other.stop()
    return {"luthier": luthier.facts, "peer": peer, "peer_facts": other.facts if other else None, "cases": measured}


def print_header(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    limit = facts["bandwidth"] / facts["weight_bytes"]
    print(
        f"\nSmolLM2-135M's shape, prompts of {options.prompt}, {options.new} new tokens, temperature "
        f"{options.temperature}, {options.rounds} rounds; {facts['device']}, {hardware()}\n"
        f"luthier {facts['dtype']} ({listed(facts['versions'])}); memory read at {facts['bandwidth'] / GB:.1f} GB/s, "
        f"{facts['weight_bytes'] / GB:.3f} GB of weights: at most {limit:.0f} steps/s"
    )


def print_case(
    options: argparse.Namespace, facts: dict[str, Any], prompts: int, samples: int, sides: dict[str, list[Turn]]
) -> None:
    """Print a case's rounds, and what the medians say about reading the prompts and about decoding."""
    tokens = prompts * samples * options.new
    rates = {side: [tokens / turn["all"] for turn in turns] for side, turns in sides.items()}
    steps = {side: [decoding(options, turn) for turn in turns] for side, turns in sides.items()}
    reading = {side: [turn["reading"] for turn in turns] for side, turns in sides.items()}
    print(f"\n  {prompts} prompts x {samples} samples")
    print(f"{'round':>10} " + " ".join(f"{side:>12}" for side in sides) + f" {'ratio':>8}   tokens/s, reading included")
    for number, speeds in enumerate(zip(*rates.values(), strict=True), start=1):
        ratio = f"{speeds[0] / speeds[1]:>8.2f}" if len(speeds) > 1 else ""
        print(f"{number:>10} " + " ".join(f"{speed:>12.1f}" for speed in speeds) + f" {ratio}")
    print(row("median", rates, "{:.1f}", less_is_better=False))
    print(row("reading", reading, "{:.2f} s"))
    print(row("decoding", steps, "{:.4f} s", "a step"))
    limit = facts["weight_bytes"] / facts["bandwidth"]
    shares = " ".join(f"{limit / statistics.median(seconds):>12.0%}" for seconds in steps.values())
    print(f"{'limit':>10} {shares} {'':>8}   of the memory-bandwidth limit")


def decoding(options: argparse.Namespace, turn: Turn) -> float:
    """Return the seconds of a step, from what drawing all tokens took longer than drawing the first."""
    return (turn["all"] - turn["reading"]) / (options.new - 1)


def row(name: str, sides: dict[str, list[float]], figure: str, unit: str = "", *, less_is_better: bool = True) -> str:
    """Return the sides' medians, and the median of the rounds' ratios: how many times better Luthier is."""
    cells = " ".join(f"{figure.format(statistics.median(values)):>12}" for values in sides.values())
    pairs = list(zip(*sides.values(), strict=True))
    if len(sides) < 2:
        return f"{name:>10} {cells} {'':>8}   {unit}"
    ratio = statistics.median(theirs / ours if less_is_better else ours / theirs for ours, theirs in pairs)
    return f"{name:>10} {cells} {ratio:>8.2f}   {unit}"


if __name__ == "__main__":
    main()

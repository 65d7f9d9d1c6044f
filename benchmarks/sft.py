"""Train SmolLM2's shape with Luthier and with its peers, in turns, and print who is how fast with how much memory.

    python benchmarks/sft.py --peers trl,torch --peer-python /path/to/an/environment/with/trl/bin/python

Each peer is met in each of its dtypes. Both processes stay alive, loaded and compiled; in each round each takes a few
steps while the other waits, and their order is turned over every round, so that whatever else the machine does meets
both alike. The ratio is taken round by round, and its median is the result.

Full fine-tuning (`lora.py`: adapters) with AdamW, clipping on, rows full of tokens, weights random. On a GPU the same
command takes the GPU on every side and prints MFU. Left out on purpose: starting up and compiling (`startup.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import smollm2
from turns import Worker

HERE = Path(__file__).resolve().parent
GIB = 2**30
WARM_UP = 2


def main() -> None:
    run(parser(__doc__).parse_args())


def run(options: argparse.Namespace) -> None:
    """Meet each peer, and print and write the figures."""
    sys.stdout.reconfigure(line_buffering=True)  # rows appear as they are measured, in a file too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smollm2.write_model(folder / "model")
        smollm2.write_rows(folder / "rows.jsonl", 32 * options.batch, options.length)
        luthier = start(options, folder, "luthier", options.dtype)
        warm = luthier.turn(WARM_UP)
        print_header(options, luthier.facts, warm)
        results = [meet(options, folder, luthier, *peer) for peer in peers(options)]
        if not results:
            alone = [luthier.turn(options.steps) for _ in range(options.rounds)]
            print_alone(options, luthier.facts, alone)
            results = [{"luthier": {"facts": luthier.facts, "turns": alone}}]
        luthier.stop()
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "results": results}, indent=2) + "\n")


def parser(doc: str | None, *, rank: int = 0) -> argparse.ArgumentParser:
    """Return the options of this benchmark; with a ``rank``, those of one that trains adapters."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.set_defaults(rank=0, quantization="")
    add = found.add_argument
    if rank:
        add("--rank", type=int, default=rank, help="of the adapter of all linear modules, its alpha twice as much")
        add("--quantization", default="", choices=("", "int8", "int4", "nf4"), help="of Luthier's base")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="what Luthier computes in")
    add("--peers", default="trl" if rank else "trl,torch", help="of trl and torch; empty: Luthier alone")
    add("--peer-dtype", default="float32,bfloat16", help="of float32 and bfloat16 (autocast over fp32 weights)")
    add("--peer-python", default=sys.executable, help="the interpreter of the environment that has the peers")
    add("--peer-checkpointing", action="store_true", help="gradient checkpointing: TRL's default; slower, less memory")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=2, help="steps in a turn")
    add("--batch", type=int, default=4, help="rows in a step")
    add("--length", type=int, default=512, help="tokens in a row")
    add("--json", default="", help="a file to write all figures to")
    return found


def peers(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the (peer, dtype) pairs that can be met, and say which cannot."""
    found = []
    for peer in filter(None, options.peers.split(",")):
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer!r}) is None)"
        if subprocess.run([options.peer_python, "-c", probe], check=False).returncode:
            print(f"{peer}: skipped, since {options.peer_python} has no {peer} (--peer-python chooses another)")
            continue
        found += [(peer, dtype) for dtype in options.peer_dtype.split(",")]
    return found


def start(options: argparse.Namespace, folder: Path, side: str, dtype: str) -> Worker:
    """Start the worker of ``side`` and wait until it stands before its first step."""
    output = folder / f"{side}-{dtype}"
    output.mkdir()
    plan = {
        "model": str(folder / "model"),
        "rows": str(folder / "rows.jsonl"),
        "output": str(output),
        "batch": options.batch,
        "length": options.length,
        "dtype": dtype,
        "checkpointing": options.peer_checkpointing,
        "rank": options.rank,
        "quantization": options.quantization,
    }
    (output / "plan.json").write_text(json.dumps(plan))
    python = sys.executable if side == "luthier" else options.peer_python
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    environment["PYTHONPATH"] = str(HERE.parent)  # what is measured is the checkout that this script lies in
    # On a GPU, jax would take three quarters of the memory for itself at once.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    command = [python, str(HERE / f"sft_{side}.py"), str(output / "plan.json")]
    return Worker(command, environment, output / "log")


def meet(options: argparse.Namespace, folder: Path, luthier: Worker, peer: str, dtype: str) -> dict[str, Any]:
    """Alternate Luthier with one peer, print the rounds, and return all figures."""
    other = start(options, folder, peer, dtype)
    other.turn(WARM_UP)
    ours, theirs = [], []
    for number in range(options.rounds):
        pair = [(luthier, ours), (other, theirs)]
        for worker, reports in pair if number % 2 == 0 else reversed(pair):
            reports.append(worker.turn(options.steps))
    other.stop()
    print_meeting(options, luthier.facts, peer, other.facts, ours, theirs)
    return {
        "luthier": {"facts": luthier.facts, "turns": ours},
        "peer": {"name": peer, "facts": other.facts, "turns": theirs},
    }


def print_header(options: argparse.Namespace, facts: dict[str, Any], warm: dict[str, Any]) -> None:
    print(
        f"SmolLM2-135M's shape, {options.batch} x {options.length} tokens a step, {options.rounds} rounds of "
        f"{options.steps} steps; {facts['device']}, {hardware()}\n"
        f"luthier {facts['dtype']} ({listed(facts['versions'])}), first {WARM_UP} steps {warm['seconds']:.1f} s"
    )


def print_meeting(
    options: argparse.Namespace,
    facts: dict[str, Any],
    peer: str,
    peer_facts: dict[str, Any],
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
) -> None:
    tokens = options.steps * options.batch * options.length
    checkpointing = ", gradient checkpointing" if options.peer_checkpointing else ""
    print(f"\nagainst {peer} {peer_facts['dtype']} ({listed(peer_facts['versions'])}{checkpointing})")
    print(f"{'round':>8} {'luthier':>12} {peer:>12} {'ratio':>8}   tokens/s")
    for number, (mine, its) in enumerate(zip(ours, theirs, strict=True), start=1):
        speeds = [tokens / report["seconds"] for report in (mine, its)]
        print(f"{number:>8} {speeds[0]:>12.1f} {speeds[1]:>12.1f} {speeds[0] / speeds[1]:>8.2f}")
    ratios = pairs(ours, theirs, "seconds")
    rates = [tokens / statistics.median(report["seconds"] for report in side) for side in (ours, theirs)]
    print(f"{'median':>8} {rates[0]:>12.1f} {rates[1]:>12.1f} {statistics.median(ratios):>8.2f}")
    work = [statistics.median(report["cpu_seconds"] / report["steps"] for report in side) for side in (ours, theirs)]
    print(f"  CPU seconds a step: {work[0]:.1f} against {work[1]:.1f}: {work[1] / work[0]:.2f} x")
    print_memory(peer, ours[-1], theirs[-1])
    if facts["peak_flops"]:
        mfu = [f"{rate * facts['flops_per_token'] / facts['peak_flops']:.1%}" for rate in rates]
        print(f"  MFU: {mfu[0]} against {mfu[1]}")


def print_memory(peer: str, mine: dict[str, Any], its: dict[str, Any]) -> None:
    for key, name in (("peak_bytes", "peak memory of the process"), ("device_peak_bytes", "peak memory of the GPU")):
        if mine[key] and its[key]:
            share = mine[key] / its[key]
            print(f"  {name}: {mine[key] / GIB:.2f} GiB against {its[key] / GIB:.2f} GiB, {share:.0%} of {peer}'s")


def print_alone(options: argparse.Namespace, facts: dict[str, Any], turns: Sequence[dict[str, Any]]) -> None:
    speeds = [options.steps * options.batch * options.length / report["seconds"] for report in turns]
    rate = statistics.median(speeds)
    mfu = f", MFU {rate * facts['flops_per_token'] / facts['peak_flops']:.1%}" if facts["peak_flops"] else ""
    print(f"tokens/s: median {rate:.1f} ({min(speeds):.1f} to {max(speeds):.1f}){mfu}")
    print(f"peak memory of the process: {turns[-1]['peak_bytes'] / GIB:.2f} GiB")
    if turns[-1]["device_peak_bytes"]:
        print(f"peak memory of the GPU: {turns[-1]['device_peak_bytes'] / GIB:.2f} GiB")


def pairs(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return how many times less of ``key`` Luthier took, round by round."""
    return [its[key] / mine[key] for mine, its in zip(ours, theirs, strict=True)]


def hardware() -> str:
    """Return the processor and how many cores may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that has no name there
        pass
    return f"{name}, {cores} cores"


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    main()

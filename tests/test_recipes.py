"""Recipes resolve, the README's table names them all, and the demo's conversations are right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from luthier import config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("luthier_demo", ROOT / "recipes" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_resolves_and_is_in_the_readme(path):
    command = "rl" if "loss_algo" in path.read_text(encoding="utf-8") else "sft"
    resolved = config.resolve(command, [str(path), "load_parameters_path=model.gguf"], {})
    assert resolved.run_name == path.stem
    assert f"(recipes/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_recipe_names_what_the_demo_writes(demo):
    resolved = config.resolve("sft", [str(demo.RECIPE), "load_parameters_path=model.gguf"], {})
    assert Path(resolved.hf_path) == demo.DATA
    assert Path(resolved.base_output_directory) / resolved.run_name == demo.RUN


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("4 - 1 - 7", "4 - 1 = 3\n3 - 7 = -4\nAnswer: -4"),
        ("15 - 43 + 75", "15 - 43 = -28\n-28 + 75 = 47\nAnswer: 47"),
    ],
)
def test_sums_are_worked_from_left_to_right(demo, expression, text):
    assert demo.worked(expression) == text


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("4 - 1 = 3\nAnswer: 3", "Answer: 3"),
        ("Answer: -33\n", "Answer: -33"),
        ("Answer: 3.", ""),
        ("So Answer: 3", ""),
        ("Answer: 3\nAnd so on.", ""),
        ("The answer is 3", ""),
        ("", ""),
    ],
)
def test_an_answer_counts_if_it_ends_as_it_was_asked_to(demo, answer, line):
    assert demo.last_line(answer) == line


def test_the_demo_asks_held_out_problems_and_shows_the_answers(demo, tmp_path, monkeypatch, capsys):
    rows = [demo.conversation(f"{n} + 1 - 2 =", f"{n} + 1 - 2") for n in range(demo.TRAIN_ROWS + demo.TEST_ROWS)]
    monkeypatch.setattr(demo, "conversations", lambda count, seed: rows[:count])
    monkeypatch.setattr(demo, "DATA", tmp_path)
    demo.write_data(tmp_path)
    asked = [json.loads(line)["messages"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert asked == [row["messages"][:2] for row in rows[demo.TRAIN_ROWS :][: demo.ASKED_ROWS]]
    right = [row["messages"][2]["content"] for row in rows[demo.TRAIN_ROWS :][: demo.ASKED_ROWS]]
    demo.compare(["I do not know.\n\n\n\n\nSorry."] * len(right), right)
    shown = capsys.readouterr().out
    assert "400 + 1 - 2 = ?" in shown
    assert "400 + 1 = 401" in shown
    for name in ("ends as asked", "right"):
        (row,) = (line for line in shown.splitlines() if line.startswith(f"│ {name} "))
        assert [f"{count} of {demo.ASKED_ROWS}" in row for count in (0, demo.ASKED_ROWS)] == [True, True]


def test_the_demo_writes_distinct_problems_with_right_answers(demo):
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    rows = demo.conversations(30, seed=3)
    assert rows == demo.conversations(30, seed=3)
    assert len({str(row) for row in rows}) == 30
    for row in rows:
        system, question, answer = (message["content"] for message in row["messages"])
        assert system == demo.INSTRUCTION
        problem = question.removeprefix("State the final answer to the following arithmetic problem: ").rstrip(" =")
        assert answer.endswith(f"\nAnswer: {eval(problem)}")

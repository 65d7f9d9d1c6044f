"""Recipes resolve, the README's table names them all, and the demo's conversations are right."""

from __future__ import annotations

import importlib.util
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
    resolved = config.resolve("sft", [str(path), "load_parameters_path=model.gguf"], {})
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

"""`luthier eval` as a user starts it, on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from luthier import cli
from luthier import mesh as mesh_lib
from luthier.config import EvalConfig
from luthier.data import chat
from luthier.data.schemas import recognise
from luthier.rollout.opened import open_model
from luthier.types import Batch
from tiny import ROOT, needs_reasoning_gym

PROMPTS, SAMPLES = 5, 4
OWN = """
def even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]

def halves(completions, **kwargs):
    return [len(text) % 3 / 2 for text in completions]

def seldom(prompts, **kwargs):
    return [None if "2 + 2" in prompt else 1.0 for prompt in prompts]

def seen(prompts, completions, reference, **columns):
    assert prompts[0] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}], prompts
    assert completions[0][0]["role"] == "assistant" and len(completions) == 2
    assert reference == ["hi"] * 2 and columns["level"] == [3, 3]
    return [1.0, 0.0]

calls = 0

def interrupted(completions, **kwargs):
    global calls
    calls += 1
    if calls == 3:
        raise KeyboardInterrupt
    return [1.0] * len(completions)

def fails(question, **kwargs):
    raise ZeroDivisionError

def flaky(question, **kwargs):
    return [1.0 / (question[0] != "What is 3 + 3?") for _ in question]

def partly(question, **kwargs):
    return [ConnectionError("away") if question[0] == "What is 1 + 1?" and not n else 1.0 for n in range(len(question))]

def nothing(completions, **kwargs):
    return [None] * len(completions)

def lacking(completions, solution):
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    lines = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "own.py").write_text(OWN)
    return folder


def keys(model: Path, rows: Path, folder: Path, **changes: Any) -> list[str]:
    chosen = {
        "load_parameters_path": model,
        "hf_path": rows / "rows.jsonl",
        "base_output_directory": folder,
        "dtype": "float32",
        "jax_cache_dir": ROOT / ".cache" / "jax",
        "max_target_length": 96,
        "max_num_seqs": 8,
        "max_new_tokens": 8,
        "num_generations": SAMPLES,
        "temperature": 1.0,
    } | changes
    return [f"{name}={value}" for name, value in chosen.items() if value is not None]


def results(folder: Path, name: str = "eval") -> tuple[dict, list[dict]]:
    lines = (folder / name / "completions.jsonl").read_text().splitlines()
    return json.loads((folder / name / "results.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def first(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with several functions, one of which has no opinion of one prompt, and one settings."""
    folder = tmp_path_factory.mktemp("runs")
    functions = f"['{rows}/own.py:even', '{rows}/own.py:halves', '{rows}/own.py:seldom', 'final_number', 'length']"
    chosen = {"reward_functions": functions, "reward_kwargs": '{"length": {"maximum": 7}}', "pass_threshold": 0.5}
    assert cli.main(["eval", *keys(tiny_model, rows, folder, **chosen)]) == 0
    return folder


def test_results_are_those_of_the_completions(first):
    found, lines = results(first)
    assert (found["prompts"], found["num_generations"], len(lines)) == (PROMPTS, SAMPLES, PROMPTS * SAMPLES)
    lines.sort(key=lambda line: (line["index"], line["sample"]))
    assert [(line["index"], line["sample"]) for line in lines] == [
        (p, g) for p in range(PROMPTS) for g in range(SAMPLES)
    ]
    for name in ("even", "halves"):
        given_PG = np.array([line["rewards"][name] for line in lines]).reshape(PROMPTS, SAMPLES)
        measures = found["rewards"][name]
        assert measures["mean"]["value"] == pytest.approx(given_PG.mean())
        assert measures["pass@1"]["value"] == pytest.approx((given_PG >= 0.5).mean())
        assert measures[f"pass@{SAMPLES}"]["value"] == pytest.approx((given_PG >= 0.5).any(axis=1).mean())
        assert measures["mean"]["low"] <= measures["mean"]["value"] <= measures["mean"]["high"]
        assert set(measures) == {"mean", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4", "unscored_prompts",
                                 "failed_completions"}  # fmt: skip
    lengths = [line["completion_tokens"] for line in lines]
    assert found["completions"]["mean_length"] == pytest.approx(np.mean(lengths))
    assert found["completions"]["clipped_ratio"] == np.mean([line["finish_reason"] == "length" for line in lines])
    assert sum(found["completions"]["finish_reason"].values()) == len(lines)
    assert {line["reference"] for line in lines} == {f"#### {2 * n}" for n in range(PROMPTS)}
    assert lines[0]["place"].endswith("rows.jsonl, line 1")


def test_prompts_have_luck_of_their_own(first):
    _, lines = results(first)
    assert len({line["completion"] for line in lines if line["sample"] == 0}) == PROMPTS
    assert len({line["completion"] for line in lines if line["index"] == 0}) == SAMPLES


def test_no_opinion_of_a_prompt_is_counted(first):
    found, lines = results(first)
    assert found["rewards"]["seldom"]["unscored_prompts"] == 1
    assert found["rewards"]["seldom"]["mean"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert {line["rewards"]["seldom"] for line in lines if line["index"] == 2} == {None}


def test_the_same_command_gives_the_same_completions(first, tiny_model, rows, tmp_path):
    same = keys(tiny_model, rows, tmp_path, reward_functions="['final_number']")
    assert cli.main(["eval", *same]) == 0
    assert cli.main(["eval", *same, "seed=1", "run_name=other"]) == 0
    said = [{(line["index"], line["sample"]): line["completion"] for line in results(*place)[1]} for place in
            ((first,), (tmp_path,), (tmp_path, "other"))]  # fmt: skip
    assert said[0] == said[1] != said[2]


def test_a_function_has_its_settings(first):
    _, lines = results(first)
    assert {line["completion_tokens"] for line in lines} > {8}
    assert all((line["rewards"]["length"] == 1.0) == (line["completion_tokens"] < 8) for line in lines)


def test_results_are_not_overwritten(first, tiny_model, rows, capsys):
    assert cli.main(["eval", *keys(tiny_model, rows, first, reward_functions="['final_number']")]) == 2
    assert "holds the results of an evaluation" in capsys.readouterr().err


def test_messages_are_seen_as_messages(tiny_model, rows, tmp_path, capsys):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "level": 3}) + "\n")
    asked = keys(
        tiny_model,
        tmp_path,
        tmp_path,
        reward_functions=f"['{rows}/own.py:seen']",
        num_generations=2,
        system_prompt="be brief",
    )
    assert cli.main(["eval", *asked]) == 0, capsys.readouterr().err
    assert results(tmp_path)[0]["rewards"]["seen"]["mean"]["value"] == 0.5
    assert "seen pass@2" in capsys.readouterr().out


def test_what_fails_is_unscored_and_the_run_goes_on(tiny_model, rows, tmp_path, capsys):
    functions = ", ".join(f"'{rows}/own.py:{name}'" for name in ("flaky", "partly", "nothing"))
    assert cli.main(["eval", *keys(tiny_model, rows, tmp_path, reward_functions=f"[{functions}]")]) == 0
    found, lines = results(tmp_path)
    counts = {name: (each["failed_completions"], each["unscored_prompts"]) for name, each in found["rewards"].items()}
    assert counts == {"flaky": (SAMPLES, 1), "partly": (1, 1), "nothing": (0, PROMPTS)}
    assert found["rewards"]["flaky"]["mean"]["value"] == found["rewards"]["partly"]["mean"]["value"] == 1.0
    assert [line["rewards"]["flaky"] for line in lines if line["index"] == 3] == [None] * SAMPLES
    assert sum(line["rewards"]["partly"] is None for line in lines) == 1
    said = capsys.readouterr().out
    assert "line 4: reward function `flaky` failed: ZeroDivisionError" in said
    assert "line 2: reward function `partly` failed: ConnectionError: away" in said
    assert f"`flaky` failed on {SAMPLES} completions of 1 prompts" in said
    assert "`nothing` gave None to completions of every prompt, so it has no mean" in said
    assert f"failed_completions {SAMPLES}" in " ".join(said.split())


def test_a_function_that_always_fails_ends_the_run_soon(tiny_model, rows, tmp_path, capsys):
    functions = f"['{rows}/own.py:even', '{rows}/own.py:fails']"
    assert cli.main(["eval", *keys(tiny_model, rows, tmp_path, reward_functions=functions, max_num_seqs=1)]) == 2
    assert "`fails` failed: ZeroDivisionError" in capsys.readouterr().err
    lines = (tmp_path / "eval" / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 3 * SAMPLES  # what was sampled is kept


def test_completions_of_an_unfinished_run_are_set_aside(tiny_model, rows, tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "config.yml").touch()
    (tmp_path / "eval" / "completions.jsonl").write_text("second\n")
    (tmp_path / "eval" / "completions.1.jsonl").write_text("first\n")
    asked = keys(tiny_model, rows, tmp_path, reward_functions="['final_number']", hf_eval_split="train[:1]")
    assert cli.main(["eval", *asked]) == 0, capsys.readouterr().err
    assert [(tmp_path / "eval" / f"completions.{n}.jsonl").read_text() for n in (1, 2)] == ["first\n", "second\n"]
    assert len(results(tmp_path)[1]) == SAMPLES
    assert "completions.2.jsonl" in capsys.readouterr().out


def test_columns_are_checked_before_the_model_is_opened(rows, tmp_path, capsys):
    asked = keys(tmp_path / "no_model", rows, tmp_path, reward_functions=f"['{rows}/own.py:lacking']")
    assert cli.main(["eval", *asked]) == 2
    assert "`lacking` needs `solution`" in capsys.readouterr().err


def test_the_default_length_of_completions_is_cut_to_the_room(tiny_model, rows, tmp_path):
    asked = keys(
        tiny_model, rows, tmp_path, reward_functions="['final_number']", max_new_tokens=None, ignore_eos="true",
        num_generations=1, hf_eval_split="train[:1]",
    )  # fmt: skip
    assert cli.main(["eval", *asked]) == 0
    ((line,), recipe) = results(tmp_path)[1], tmp_path / "eval" / "config.yml"
    assert line["prompt_tokens"] + line["completion_tokens"] == 96
    assert cli.main(["eval", str(recipe), "run_name=again"]) == 0  # a recipe that holds the default


@needs_reasoning_gym
def test_reasoning_gym_scores_by_its_verifier(tiny_model, rows, tmp_path):
    asked = keys(
        tiny_model, rows, tmp_path, hf_path="reasoning_gym:chain_sum,max_terms=2", hf_eval_split="test[:2]",
        num_generations=1, use_chat_template="false",
    )  # fmt: skip
    assert cli.main(["eval", *asked]) == 0
    found, lines = results(tmp_path)
    assert set(found["rewards"]) == {"reasoning_gym"}
    assert found["dataset"] == "reasoning_gym:chain_sum,max_terms=2 (test)"
    assert len(lines) == 2


def test_an_interrupted_run_leaves_what_it_had(tiny_model, rows, tmp_path):
    asked = keys(tiny_model, rows, tmp_path, reward_functions=f"['{rows}/own.py:interrupted']")
    assert cli.main(["eval", *asked]) == 130
    lines = (tmp_path / "eval" / "completions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * SAMPLES
    assert all(line.endswith("\n") and json.loads(line)["rewards"] == {"interrupted": 1.0} for line in lines)
    assert not (tmp_path / "eval" / "results.json").exists()


def test_text_is_scored_as_the_whole_model_does(tiny_model, rows, tmp_path):
    """Packed rows give the mean over tokens that each text alone gives."""
    texts = ["Some text of a few words.", "Other text.", "A third one, somewhat longer than both of the others."]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = keys(tiny_model, rows, tmp_path, hf_path=tmp_path / "texts.jsonl", num_generations=None, temperature=None)
    assert cli.main(["eval", *asked]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["text"]
    opened = open_model(EvalConfig(**dict(pair.split("=", 1) for pair in asked)))
    total, count, right = 0.0, 0, 0
    with mesh_lib.use(opened.mesh):
        for text in texts:
            ids_T = np.array(
                chat.encode(opened.tokenizer, [recognise(["text"]).read({"text": text})], chat.Rendering())[0].ids_T
            )
            ids_BT = np.broadcast_to(ids_T, (8, len(ids_T)))
            ones, places = np.ones_like(ids_BT), np.broadcast_to(np.arange(len(ids_T), dtype=np.int32), ids_BT.shape)
            logits_TV = opened.model.logits(opened.params, Batch(ids_BT, places, ones, ones > 0), opened.compute)[0]
            logp_TV = np.asarray(jax.nn.log_softmax(logits_TV), np.float64)
            total -= logp_TV[np.arange(len(ids_T) - 1), ids_T[1:]].sum()
            right += (logp_TV[:-1].argmax(axis=1) == ids_T[1:]).sum()
            count += len(ids_T) - 1
    assert found["num_scored_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["mean_token_accuracy"] == pytest.approx(right / count)
    assert not (tmp_path / "eval" / "completions.jsonl").exists()


def test_replies_of_conversations_are_scored_where_no_function_is_named(tiny_model, rows, tmp_path):
    assert cli.main(["eval", *keys(tiny_model, rows, tmp_path, num_generations=None)]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["text"]
    assert found["rows"] == PROMPTS
    assert 0 < found["num_scored_tokens"] < found["num_tokens"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hf_path": None}, ["no dataset", "hf_path"]),
        ({"hf_path": "nowhere.jsonl"}, ["hf_path=nowhere.jsonl", "no such file"]),
        ({"hf_eval_split": "tset"}, ["hf_eval_split=tset", "which has train"]),
        ({"reward_functions": "['final_numbr']"}, ["final_numbr", "Did you mean `final_number`?"]),
        ({"reward_functions": "own.py:nothing"}, ["reward_functions=own.py:nothing", "no file own.py"]),
        ({"temperature": 0}, ["num_generations=4 at temperature=0"]),
        ({"temperature": -1}, ["temperature=-1", "greater than or equal to 0"]),
        ({"pass_at_k": "[8]"}, ["pass_at_k=8", "num_generations=4"]),
        ({"max_new_tokens": 96}, ["max_new_tokens=96", "max_target_length=96"]),
        ({"max_target_length": 16}, ["rows.jsonl, line 1", "16"]),
        ({"reward_functions": "['{rows}/own.py:fails']"}, ["rows.jsonl, line", "`fails` failed: ZeroDivisionError"]),
        ({"reward_functions": "['{rows}/own.py:lacking']"}, ["rows.jsonl", "`lacking` needs `solution`", "answer"]),
        ({"hf_path": "{rows}/text.jsonl"}, ["plain text", "final_number"]),
        ({"hf_path": "{rows}/empty.jsonl"}, ["empty.jsonl, line 1", "nothing comes before its reply"]),
        ({"load_parameters_path": "nowhere.gguf"}, ["nowhere.gguf"]),
    ],
)
def test_mistakes_are_one_message(changes, words, tiny_model, rows, tmp_path, capsys):
    (rows / "text.jsonl").write_text('{"text": "plain"}\n')
    (rows / "empty.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hi"}]}\n')
    changes = {"reward_functions": "['final_number']"} | changes
    changes = {name: value.format(rows=rows) if isinstance(value, str) else value for name, value in changes.items()}
    assert cli.main(["eval", *keys(tiny_model, rows, tmp_path, **changes)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("luthier eval: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words), message
    assert not (tmp_path / "eval" / "results.json").exists()


def test_the_folder_of_another_kind_of_run_is_left_alone(tiny_model, rows, tmp_path, capsys):
    (tmp_path / "eval" / "model").mkdir(parents=True)
    (tmp_path / "eval" / "config.yml").write_text("load_parameters_path: other\n")
    assert cli.main(["eval", *keys(tiny_model, rows, tmp_path, reward_functions="['final_number']")]) == 2
    assert "holds a different run" in capsys.readouterr().err

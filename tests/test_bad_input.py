"""Every mistake that a user can make with `luthier sft`: one message, exit code 2, nothing trained."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from luthier import cli
from tiny import ROOT

GOOD = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}
SECONDS = 60  # generous: a loaded machine, two libraries imported for the first time; training would take longer

Sft = Callable[..., str]


def rows_with(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def messages(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def sft(tmp_path: Path, tiny_model: Path, tiny_rows: Path, capsys: pytest.CaptureFixture[str]) -> Sft:
    """Run `luthier sft` with one thing wrong, and return the message."""

    def run(**keys: object) -> str:
        chosen = {
            "base_output_directory": tmp_path / "runs",
            "load_parameters_path": tiny_model,
            "hf_path": tiny_rows,
            "max_target_length": 64,
            "per_device_batch_size": 1,
            "jax_cache_dir": ROOT / ".cache" / "jax",
        } | keys
        started = time.monotonic()
        code = cli.main(["sft", *(f"{name}={value}" for name, value in chosen.items() if value is not None)])
        assert time.monotonic() - started < SECONDS
        captured = capsys.readouterr()
        assert code == 2, captured
        assert "Traceback" not in captured.err
        assert captured.err.startswith("luthier sft: ")
        assert not list(tmp_path.glob("runs/*/config.yml"))
        return captured.err

    return run


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"learning_rat": 1}, ["unknown key `learning_rat`", "Did you mean `learning_rate`"]),
        ({"steps": "ten"}, ["steps=ten", "command line", "integer"]),
        ({"dtype": "float8"}, ["dtype=float8", "bfloat16"]),
        ({"hf_path": None}, ["no dataset", "hf_path"]),
        ({"load_parameters_path": None}, ["no model", "model_name"]),
        ({"hf_path": "nowhere.jsonl"}, ["nowhere.jsonl", "hf_path"]),
        ({"load_parameters_path": "./nowhere"}, ["nowhere", "load_parameters_path"]),
        ({"tokenizer_path": "./nowhere"}, ["nowhere", "tokenizer_path"]),
        ({"train_data_columns": "['dialog']"}, ["dialog", "messages"]),
        ({"train_split": "trian"}, ["trian", "train"]),
        ({"formatting_func_path": "nowhere.format"}, ["formatting_func_path", "nowhere"]),
        ({"chat_template_path": "nowhere.jinja"}, ["chat_template_path", "nowhere.jinja"]),
        ({"chat_template": "{% for %}"}, ["chat_template", "not valid Jinja", "line 1"]),
        ({"ici_tensor_parallelism": 3}, ["ici_tensor_parallelism=3", "8"]),
        ({"ici_tensor_parallelism": 8}, ["tensor=8", "ici_tensor_parallelism", "heads"]),
        ({"per_device_batch_size": 10_000_000}, ["per_device_batch_size=10000000", "GiB", "fits"]),
        ({"max_target_length": 2_000_000_000}, ["not even one row fits", "remat_policy=full", "max_target_length"]),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_wrong_key(sft: Sft, keys: dict, words: list[str]) -> None:
    message = sft(**keys)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (messages(("user", "Hi"), ("assistant", None)), ["content", "null"]),
        (messages(("user", "Hi"), ("robot", "Hello")), ["robot", "assistant"]),
        (messages(), ["messages", "empty"]),
        (messages(("user", "Hi"), ("assistant", 3)), ["content", "3"]),
        ({"messages": None}, ["messages", "null"]),
        ('{"messages": [', ["JSON"]),
    ],
    ids=["null", "role", "empty", "number", "no messages", "not JSON"],
)
def test_a_bad_row_is_named(sft: Sft, tmp_path: Path, row: object, words: list[str]) -> None:
    path = rows_with(tmp_path, GOOD, GOOD, row)
    message = sft(hf_path=path)
    for word in [str(path), "3", *words]:
        assert word in message


def test_a_row_that_the_template_refuses_is_named(sft: Sft, tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn!') }}{% endif %}"
    path = rows_with(tmp_path, messages(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")))
    message = sft(hf_path=path, chat_template=template)
    for word in (str(path), "1", "No system turn!"):
        assert word in message


def test_rows_without_a_trained_token_are_refused(sft: Sft, tmp_path: Path) -> None:
    message = sft(hf_path=rows_with(tmp_path, messages(("user", "Hello?"))))
    assert "trained token" in message
    assert "sft_train_on_completion_only=false" in message


def test_prompts_that_fill_the_row_are_refused(sft: Sft, tmp_path: Path) -> None:
    path = rows_with(tmp_path, messages(("user", "x" * 200), ("assistant", "y")))
    message = sft(hf_path=path)
    assert "max_target_length=64" in message
    assert str(path) in message


def test_a_checkpoint_without_a_config_is_refused(sft: Sft, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"")
    message = sft(load_parameters_path=folder)
    assert "config.json" in message
    assert str(folder) in message


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(sft: Sft, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in tiny_model.iterdir():
        os.link(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4} | {"intermediate_size": 96}))
    message = sft(load_parameters_path=folder)
    assert "missing: model.layers.3.mlp.up_proj.weight" in message
    assert "misshapen: model.layers.0.mlp.up_proj.weight is 128x64, config.json asks for 96x64" in message


def test_a_tokenizer_of_another_model_is_refused(sft: Sft, tmp_path: Path, tiny_rows: Path) -> None:
    tiny.write_model(tmp_path / "small", vocab_size=100)
    message = sft(load_parameters_path=tmp_path / "small")
    assert f"{tiny_rows}" in message
    assert "over the model's vocabulary of 100" in message
    assert "tokenizer_path" in message


def test_a_hub_that_cannot_be_reached(sft: Sft) -> None:
    message = sft(load_parameters_path="some-org/some-model")
    assert "some-org/some-model" in message
    message = sft(hf_path="some-org/some-dataset")
    assert "some-org/some-dataset" in message


def test_an_output_folder_that_holds_something_else(sft: Sft, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.tex").write_text("")
    message = sft(run_name="mine")
    assert "no config.yml" in message
    assert "run_name" in message


def test_a_base_output_directory_that_cannot_be_made(sft: Sft, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "base_output_directory" in sft(base_output_directory=tmp_path / "file" / "runs")

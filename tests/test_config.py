"""How keys are resolved, and what a user reads when one is wrong."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from luthier import config, keys
from luthier.errors import UserError

NEEDED = ["model_name=model", "hf_path=rows.jsonl"]


def resolve(*arguments: str, **environment: str) -> config.SftConfig:
    return config.resolve("sft", [*NEEDED, *arguments], environment)


def message(*arguments: str, **environment: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*arguments, **environment)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_each_source_overrides_the_weaker_ones(recipe):
    path = recipe("steps: 2\nseed: 2\nlog_period: 2\n")
    resolved = resolve(path, "steps=4", LUTHIER_STEPS="3", LUTHIER_SEED="3")
    assert (resolved.steps, resolved.seed, resolved.log_period, resolved.profiler_steps) == (4, 3, 2, 3)


def test_the_command_line_wins_wherever_the_recipe_stands(recipe):
    assert resolve("steps=4", recipe("steps: 2")).steps == 4


def test_the_last_of_two_arguments_counts():
    assert resolve("steps=4", "steps=5").steps == 5


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("dataset_name=other.jsonl", "hf_path", "other.jsonl"),
        ("eval_split=test", "hf_eval_split", "test"),
        ("learning_rate_schedule=wsd", "lr_schedule_type", "wsd"),
        ("--steps=7", "steps", 7),
        ("steps=010", "steps", 10),
        ("steps=-1", "steps", -1),
        ("ici_fsdp_parallelism=-1", "ici_fsdp_parallelism", -1),
        ("learning_rate=1e-5", "learning_rate", 1e-5),
        ("scan_layers=False", "scan_layers", False),
        ("packing=off", "packing", False),
        ("run_name=0123", "run_name", "0123"),
        ("run_name=none", "run_name", "none"),
        ("hf_name=none", "hf_name", None),
        ("hf_name=", "hf_name", None),
        ("hf_name=2024", "hf_name", "2024"),
        ("train_split=train[:90%]", "train_split", "train[:90%]"),
        ("chat_template={% for m in messages %}{{ m.content }}={% endfor %}", "chat_template", None),
        ("train_data_columns=['prompt', 'completion']", "train_data_columns", ["prompt", "completion"]),
        ("train_data_columns=[messages]", "train_data_columns", ["messages"]),
        ("train_data_columns=null", "train_data_columns", None),
        (
            'train_data_columns={"prompt":"input","completion":"output"}',
            "train_data_columns",
            {"prompt": "input", "completion": "output"},
        ),
        ("formatting_func_kwargs={rate: 2, names: [a]}", "formatting_func_kwargs", {"rate": 2, "names": ["a"]}),
        ('formatting_func_kwargs={"rate": 1e-5}', "formatting_func_kwargs", {"rate": 1e-5}),
    ],
)
def test_values_are_read_by_their_type(argument, key, value):
    if value is None and key == "chat_template":
        value = argument.partition("=")[2]
    assert getattr(resolve(argument), key) == value
    assert type(getattr(resolve(argument), key)) is type(value)


def test_a_recipe_is_read_as_the_command_line_is(recipe):
    path = recipe(
        "run_name: 0123\nhf_name: 2024\nlearning_rate: 1e-5\npacking: off\ntokenizer_path:\nnum_epoch: null\n"
    )
    resolved = resolve(path)
    assert (resolved.run_name, resolved.hf_name, resolved.learning_rate) == ("0123", "2024", 1e-5)
    assert (resolved.packing, resolved.tokenizer_path, resolved.num_epoch) == (False, "", None)


def test_lists_and_mappings_of_a_recipe_keep_their_types(recipe):
    path = recipe('train_data_columns: [messages]\nformatting_func_kwargs: {drop: true, name: "1", rate: 2}\n')
    resolved = resolve(path)
    assert resolved.train_data_columns == ["messages"]
    assert resolved.formatting_func_kwargs == {"drop": True, "name": "1", "rate": 2}


def test_an_empty_recipe_sets_nothing(recipe):
    assert resolve(recipe("# nothing\n")) == resolve()


def test_variables_of_others_are_not_read():
    assert resolve(STEPS="3", MY_LUTHIER_STEPS="3").steps == -1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["setps=3"], ["`setps`", "command line", "Did you mean `steps`?"]),
        (["qqqq=3"], ["`qqqq`", "luthier keys"]),
        (["steps=ten"], ["steps=ten", "command line", "integer"]),
        (["steps=1.5"], ["steps=1.5", "integer"]),
        (["steps="], ["steps=", "integer"]),
        (["steps=0"], ["steps=0", "-1"]),
        (["num_epoch=0"], ["num_epoch=0", "greater than 0"]),
        (["per_device_batch_size=-4"], ["per_device_batch_size=-4", "greater than 0"]),
        (["learning_rate=nan"], ["learning_rate=nan", "finite"]),
        (["learning_rate=-1"], ["learning_rate=-1", "greater than 0"]),
        (["packing=maybe"], ["packing=maybe", "true or false"]),
        (["dtype=fp16"], ["dtype=fp16", "bfloat16", "float32"]),
        (["train_data_columns=[messages"], ["train_data_columns=[messages", "list", "['messages']"]),
        (["formatting_func_kwargs={a:["], ["formatting_func_kwargs={a:[", "mapping"]),
        (["run_name="], ["run_name=", "at least 1 character"]),
        (["eval_fraction=1"], ["eval_fraction=1", "less than 1"]),
        (["eval_interval=0"], ["eval_interval=0", "-1"]),
        (["eval_steps=0"], ["eval_steps=0", "-1"]),
        (["ici_fsdp_parallelism=0"], ["ici_*_parallelism=0"]),
        (["ici_data_parallelism=-1"], ["more than one ici_*_parallelism"]),
        (["dcn_data_parallelism=0"], ["dcn_*_parallelism=0", "slices"]),
        (["dcn_data_parallelism=-1", "dcn_fsdp_parallelism=-1"], ["more than one dcn_*_parallelism"]),
        (["context_parallel_strategy=ring", "attention=splash"], ["attention=splash", "all_gather"]),
        (["chat_template=a", "chat_template_path=b"], ["chat_template_path", "keep one"]),
        (["lr_schedule_type=wsd", "warmup_steps_fraction=0.95"], ["wsd_decay_steps_fraction", "more than 1"]),
        (["model_name="], ["model_name=...", "load_parameters_path=..."]),
        (["model_name=", "load_parameters_path=random"], ["model_name=..."]),
        (["hf_path="], ["hf_path=..."]),
        (["missing.yml"], ["recipe missing.yml", "no such file"]),
        (["one.yml", "two.yml"], ["more than one recipe", "one.yml two.yml"]),
        (["--steps", "3"], ["more than one recipe"]),
        (["--steps"], ["unknown option --steps", "key=value"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(arguments, parts):
    text = message(*arguments)
    assert all(part in text for part in parts), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("setps: 3\n", ["`setps`", "recipe.yml", "`steps`"]),
        ("steps: ten\n", ["steps=ten", "recipe.yml", "integer"]),
        ("steps: [1]\n", ["steps=[1]", "recipe.yml", "integer"]),
        ("- steps\n", ["recipe.yml", "key: value"]),
        ("steps: [1\n", ["recipe.yml", "not valid YAML"]),
        ("steps: 1\nsteps: 2\n", ["recipe.yml", "`steps`", "twice"]),
        ("hf_path: a\ndataset_name: b\n", ["recipe.yml", "`hf_path`", "twice"]),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(recipe, text, parts):
    found = message(recipe(text))
    assert all(part in found for part in parts), found


def test_a_mistake_in_the_environment_names_the_variable():
    assert "environment variable LUTHIER_STEPS" in message(LUTHIER_STEPS="ten")
    assert "Did you mean `steps`?" in message(LUTHIER_SETPS="3")


def test_a_folder_is_no_recipe(tmp_path):
    assert "is a directory" in message(str(tmp_path))


TUTORIAL = """
run_name=run base_output_directory=/tmp/out model_name=/tmp/model load_parameters_path=/tmp/model
per_device_batch_size=1 steps=10 hf_path=/tmp/rows.jsonl train_split=train
train_data_columns="['messages']" profiler=xplane
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (TUTORIAL, {"train_data_columns": ["messages"], "profiler": "xplane", "per_device_batch_size": 1}),
        (
            'model_name=m dataset_name=d train_data_columns=\'{"prompt": "input", "completion": "output"}\'',
            {"hf_path": "d", "train_data_columns": {"prompt": "input", "completion": "output"}},
        ),
        (
            "model_name=m hf_path=d train_data_columns=\"['conversations']\" "
            'formatting_func_path="my_formatters.format_sharegpt" formatting_func_kwargs=\'{"drop_system": true}\'',
            {
                "train_data_columns": ["conversations"],
                "formatting_func_path": "my_formatters.format_sharegpt",
                "formatting_func_kwargs": {"drop_system": True},
            },
        ),
    ],
)
def test_commands_of_the_reference_tutorial_parse(command, expected):
    resolved = config.resolve("sft", shlex.split(command), {})
    assert {name: getattr(resolved, name) for name in expected} == expected


def test_config_yml_repeats_the_run(tmp_path):
    arguments = [
        *("run_name=0123", "learning_rate=1e-5", "hf_name=none", "steps=5", "packing=off", "num_epoch=none"),
        *("chat_template={{ messages[0]['content'] }}\n€", "train_data_columns=['a']"),
        *('formatting_func_kwargs={"drop": true, "n": "1", "rate": 1e-5}', "hf_access_token=secret"),
    ]
    resolved = resolve(*arguments)
    keys.save(resolved, tmp_path / "config.yml")
    assert "secret" not in (tmp_path / "config.yml").read_text(encoding="utf-8")
    again = config.resolve("sft", [str(tmp_path / "config.yml")], {})
    assert again == resolved.model_copy(update={"hf_access_token": None})


def test_neither_secrets_nor_where_a_run_is_are_saved():
    place = ("coordinator_address=10.0.0.1:8476", "num_processes=2", "process_id=1", "hf_access_token=secret")
    assert keys.saved(resolve(*place, "steps=5")) == keys.saved(resolve("steps=5"))
    only = keys.saved(resolve(*place, "steps=5"), defaults=False).keys() - keys.saved(resolve(), defaults=False).keys()
    assert only == {"steps"}


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        resolve().steps = 3


def test_every_key_is_described_once():
    rows = [row for group in config.describe("sft").values() for row in group]
    assert sorted(row.name for row in rows) == sorted(config.SftConfig.model_fields)
    assert all(row.meaning and row.type for row in rows)
    assert len(rows) < 110


def test_described_defaults_are_the_defaults():
    for group in config.describe("sft").values():
        for row in group:
            assert resolve(f"{row.name}={row.default}" if row.name not in ("model_name", "hf_path") else "seed=0")
            default = config.SftConfig.model_fields[row.name].default
            assert row.default == default or yaml.safe_load(row.default) == default


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("other/path", ["other/path"]),
        ("Q:", ["Q:"]),
        ("12", ["12"]),
        ("\n\n##", ["\n\n##"]),
        ('["a", "b: c"]', ["a", "b: c"]),
        ("[a, b]", ["a", "b"]),
    ],
)
def test_one_item_of_a_list_needs_no_brackets(text, expected):
    arguments = ["load_parameters_path=x", f"compare={text}"]
    assert config.resolve("chat", arguments, {}).compare == expected


@pytest.mark.parametrize("text", ["", "[a", "{a: b}"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(UserError, match=r"^compare=.*\(command line\).*It takes list"):
        config.resolve("chat", ["load_parameters_path=x", f"compare={text}"], {})

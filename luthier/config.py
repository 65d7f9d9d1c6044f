"""Every key of every command: its type, its default, its meaning.

Keys are flat and carry MaxText's names wherever it has one. A configuration is resolved once, from defaults, then the
recipe, then ``LUTHIER_KEY`` environment variables, then the command line, and is frozen. The table of keys in the docs
is made from this file.

Left out on purpose: anything that needs jax, a model or the network to check. This module must import in well under a
second, so that a typo is refused at once.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from luthier.errors import UserError, did_you_mean

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Parallelism = Annotated[int, Field(ge=-1)]
Columns = list[str] | dict[str, str]


def key(default: Any, doc: str, *aliases: str, **constraints: Any) -> Any:
    """Declare a key: its default, its meaning for the table of keys, and other names that are accepted for it."""
    return Field(default, description=doc, json_schema_extra={"aliases": list(aliases)}, **constraints)


class Keys(BaseModel):
    """What all groups of keys share: frozen, unknown keys refused, aliases accepted."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


class RunKeys(Keys):
    """Where a run lives and how it reports."""

    run_name: str = key("sft", "Name of the run: its folder under `base_output_directory`.", min_length=1)
    base_output_directory: str = key("runs", "Folder that holds runs.", min_length=1)
    seed: int = key(0, "Seed of everything random: initialisation, shuffling, the held-out split.", ge=0)
    log_period: PositiveInt = key(1, "Steps between rows of `metrics.jsonl` and TensorBoard.")
    profiler: Literal["", "xplane"] = key("", "`xplane` writes a trace for TensorBoard's profile plug-in.")
    skip_first_n_steps_for_profiler: int = key(2, "Steps before the trace starts.", ge=0)
    profiler_steps: PositiveInt = key(3, "Steps that the trace covers.")
    jax_cache_dir: str = key("~/.cache/luthier/jax", "Folder of compiled programs, kept between runs; empty: none.")


class ModelKeys(Keys):
    """Which model, in which numbers, on which mesh."""

    model_name: str = key("", "Hub id, local folder or MaxText name of the model; says where to load from by itself.")
    load_parameters_path: str = key(
        "",
        "Hugging Face folder, hub id, `.gguf` file or Luthier run to start from; `random` starts from random weights "
        "with the `config.json` of `model_name`. Default: `model_name`.",
    )
    tokenizer_path: str = key("", "Folder or hub id of the tokenizer. Default: the model's own.")
    hf_access_token: str | None = key(None, "Hub token. Default: the one that `hf auth login` stored.", repr=False)
    dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "Type of the computation; `auto`: bfloat16 where the platform has a fast bfloat16 matmul."
    )
    weight_dtype: Literal["float32", "bfloat16"] = key("float32", "Type of the trained weights in memory.")
    attention: Literal["auto", "blockwise", "cudnn", "splash"] = key(
        "auto", "Attention kernel; `auto` takes the platform's best."
    )
    remat_policy: Literal["full", "dots", "none"] = key(
        "dots", "What the backward pass recomputes: all, all but matmuls and attention, or nothing."
    )
    scan_layers: bool = key(True, "Accepted for MaxText's sake; layers are always stacked and scanned.")
    ici_data_parallelism: Parallelism = key(1, "Devices along the `data` axis (replicas); -1: the rest.")
    ici_fsdp_parallelism: Parallelism = key(-1, "Devices along the `fsdp` axis (sharded weights); -1: the rest.")
    ici_tensor_parallelism: Parallelism = key(1, "Devices along the `tensor` axis (split matmuls); -1: the rest.")


class DataKeys(Keys):
    """Which rows, and how they become tokens."""

    hf_path: str = key(
        "",
        "Dataset: hub id, folder that `datasets` saved, or `.jsonl .json .parquet .csv` files (globs too).",
        "dataset_name",
    )
    hf_name: str | None = key(None, "Subset (configuration) of a hub dataset.")
    train_split: str = key("train", "Split to train on; slices such as `train[:90%]` too.")
    hf_eval_path: str = key("", "Held-out dataset, if it is not a split of `hf_path`.")
    hf_eval_split: str = key("", "Held-out split. Default: `eval_fraction` of the training split.", "eval_split")
    eval_fraction: float = key(0.0, "Share of the training split that is held out where no split is named.", ge=0, lt=1)
    train_data_columns: Columns | None = key(
        None,
        'Columns to read, such as `[\'messages\']` or `{"prompt": "input", "completion": "output"}`. '
        "Default: recognised from the dataset.",
    )
    formatting_func_path: str = key(
        "", "Function that rewrites a row first: `package.module.function` or `path/to/file.py:function`."
    )
    formatting_func_kwargs: dict[str, Any] = key({}, "Keyword arguments for it.")
    use_chat_template: bool = key(True, "Render conversations by the chat template; off: contents are joined as text.")
    chat_template: str = key("", "Jinja chat template to use in place of the tokenizer's.")
    chat_template_path: str = key("", "File of one: `.jinja`, or JSON with a `chat_template` field.")
    sft_train_on_completion_only: bool = key(
        True, "Train on assistant turns and their end token alone; off: on everything but padding."
    )
    max_target_length: int = key(1024, "Tokens in a row of the batch.", ge=2)
    packing: bool = key(True, "Pack several conversations into a row (best fit); off: one a row, padded.")
    overlong_rows: Literal["truncate", "drop"] = key("truncate", "What happens to rows over `max_target_length`.")
    enable_data_shuffling: bool = key(True, "Shuffle rows by the seed, anew each epoch.")
    grain_worker_count: int = key(1, "Processes that tokenise and read ahead; 0: none, in this process.", ge=0)


class TrainKeys(Keys):
    """The step, the optimizer, and what is kept."""

    steps: int = key(
        -1, "Optimizer steps; -1: as many as `num_epoch` gives. Where both are given, the first reached ends the run."
    )
    num_epoch: Annotated[float, Field(gt=0)] | None = key(
        None, "Passes over the training split. Default: one, or no limit where `steps` is given."
    )
    per_device_batch_size: PositiveInt = key(4, "Rows of a micro-batch on each device of the `data` and `fsdp` axes.")
    gradient_accumulation_steps: PositiveInt = key(1, "Micro-batches in a step.")
    learning_rate: float = key(2e-5, "Peak learning rate.", gt=0)
    lr_schedule_type: Literal["constant", "linear", "cosine", "wsd"] = key(
        "cosine", "Schedule after the warm-up.", "learning_rate_schedule"
    )
    warmup_steps_fraction: Fraction = key(0.03, "Share of the steps spent warming up.")
    learning_rate_final_fraction: Fraction = key(0.1, "Learning rate at the end, as a share of the peak.")
    wsd_decay_steps_fraction: Fraction = key(0.1, "Share of the steps in which `wsd` decays.")
    opt_type: Literal["adamw", "adafactor", "muon", "sgd"] = key("adamw", "Optimizer.")
    adam_b1: Fraction = key(0.9, "Decay of the first moment; momentum of `sgd` and `muon`.")
    adam_b2: Fraction = key(0.999, "Decay of the second moment.")
    adam_eps: float = key(1e-8, "Added to the root of the second moment.", gt=0)
    adam_weight_decay: float = key(0.0, "Weight decay, on matrices alone: not on norms and biases.", ge=0)
    mu_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "Type of the optimizer's moments (but for Adafactor's factors).", "moments_dtype"
    )
    gradient_clipping_threshold: float = key(1.0, "Greatest global norm of the gradient; 0: no clipping.", ge=0)
    eval_interval: int = key(-1, "Steps between evaluations on the held-out rows; -1: at the start and the end.", ge=-1)
    eval_steps: int = key(-1, "Batches in an evaluation; -1: all.", ge=-1)
    enable_checkpointing: bool = key(True, "Keep the train state, so that the same command resumes.")
    checkpoint_period: PositiveInt = key(500, "Steps between checkpoints; the last step always is one.")
    max_num_checkpoints_to_keep: PositiveInt = key(1, "Checkpoints kept, the newest first.")
    async_checkpointing: bool = key(True, "Write checkpoints while training goes on.")
    save_dtype: Literal["auto", "bfloat16", "float16", "float32"] = key(
        "auto", "Type of the weights in `model/`; `auto`: the type they were loaded in."
    )


class SftConfig(TrainKeys, DataKeys, ModelKeys, RunKeys):
    """The keys of `luthier sft`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_name and not self.load_parameters_path:
            raise ValueError("no model: set model_name=... or load_parameters_path=... (a folder, hub id or .gguf)")
        if self.load_parameters_path == "random" and not self.model_name:
            raise ValueError("load_parameters_path=random needs model_name=... for its config.json and tokenizer")
        if not self.hf_path:
            raise ValueError("no dataset: set hf_path=... (a hub id, a saved folder or files)")
        if self.steps == 0 or self.steps < -1:
            raise ValueError(f"steps={self.steps}: give a positive number, or -1 for as many as num_epoch gives")
        if self.eval_interval == 0:
            raise ValueError("eval_interval=0: give a number of steps, or -1 for one at the start and one at the end")
        if self.eval_steps == 0:
            raise ValueError("eval_steps=0: give a number of batches, or -1 for all of them")
        if self.lr_schedule_type == "wsd" and self.warmup_steps_fraction + self.wsd_decay_steps_fraction > 1:
            raise ValueError("warmup_steps_fraction and wsd_decay_steps_fraction add up to more than 1: lower one")
        if self.chat_template and self.chat_template_path:
            raise ValueError("chat_template and chat_template_path are both set: keep one")
        axes = ("ici_data_parallelism", "ici_fsdp_parallelism", "ici_tensor_parallelism")
        if any(getattr(self, axis) == 0 for axis in axes):
            raise ValueError("ici_*_parallelism=0: give a number of devices, or -1 for the rest")
        if sum(getattr(self, axis) == -1 for axis in axes) > 1:
            raise ValueError("more than one ici_*_parallelism is -1: only one axis can take the rest")
        return self


COMMANDS: dict[str, type[Keys]] = {"sft": SftConfig}


class Row(NamedTuple):
    """A key as the table of keys shows it."""

    name: str
    type: str
    default: str
    meaning: str


def resolve(command: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Return the frozen configuration of ``command`` from its arguments, ``[recipe.yml] key=value ...``.

    Raises UserError naming the first key that is unknown or whose value does not fit, and where it was set.
    """
    model = COMMANDS[command]
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, name, value in _settings(arguments, environment):
        field = _field(model, name, place)
        if place.startswith("recipe ") and places.get(field) == place:
            raise UserError(f"key `{field}` stands twice ({place}). Keep one.")
        values[field] = _parse(model.model_fields[field].annotation, value)
        places[field] = place
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(_explain(model, error, places)) from None


def save(config: Keys, path: Path) -> None:
    """Write every key as resolved, as a recipe that repeats the run. Secrets are left out."""
    values = config.model_dump(exclude={"hf_access_token"})
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def describe(command: str) -> dict[str, list[Row]]:
    """Return the keys of ``command`` by group, each group named by what it is about."""
    model = COMMANDS[command]
    groups = {}
    for group in reversed(model.__mro__):
        names = [name for name in inspect.get_annotations(group) if name in model.model_fields]
        if names:
            title = (group.__doc__ or group.__name__).splitlines()[0]
            groups[title] = [_row(name, model.model_fields[name]) for name in names]
    return groups


def _row(name: str, field: Any) -> Row:
    also = f" Also `{'`, `'.join(_aliases(field))}`." if _aliases(field) else ""
    return Row(name, _type_name(field.annotation), _yaml(field.default), (field.description or "") + also)


def _settings(arguments: Sequence[str], environment: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """Return (place, name, value) of everything that was set, the weakest first."""
    recipes = [argument for argument in arguments if "=" not in argument]
    if len(recipes) > 1:
        raise UserError(f"more than one recipe: {' '.join(recipes)}. Give one, then key=value pairs.")
    settings = [(f"recipe {recipe}", name, value) for recipe in recipes for name, value in _read_recipe(recipe)]
    for variable, value in sorted(environment.items()):
        if variable.startswith("LUTHIER_"):
            name = variable.removeprefix("LUTHIER_").lower()
            settings.append((f"environment variable {variable}", name, value))
    pairs = [argument.partition("=") for argument in arguments if "=" in argument]
    settings += [("command line", name.removeprefix("--"), value) for name, _, value in pairs]
    return settings


def _read_recipe(name: str) -> list[tuple[str, Any]]:
    """Return the lines of a recipe: scalars as they are written, so that they read as on the command line."""
    if name.startswith("-"):
        raise UserError(f"unknown option {name}. Keys are given as key=value; `luthier sft --help` shows how.")
    try:
        loader = yaml.SafeLoader(Path(name).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"recipe {name}: expected `key: value` lines.")
        return [
            (
                str(key.value),
                value.value if isinstance(value, yaml.ScalarNode) else loader.construct_object(value, True),
            )
            for key, value in node.value
        ]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"recipe {name}: {reason}. Give a YAML file, or keys as key=value.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name}: not valid YAML: {error}") from None


def _field(model: type[Keys], name: str, place: str) -> str:
    """Return the key that ``name`` stands for, through aliases; raise with a suggestion when there is none."""
    known = {}
    for field, info in model.model_fields.items():
        known |= dict.fromkeys([field, *_aliases(info)], field)
    if name not in known:
        hint = did_you_mean(name, list(known)) or " `luthier keys` lists them all."
        raise UserError(f"unknown key `{name}` ({place}).{hint}")
    return known[name]


def _parse(annotation: Any, value: Any) -> Any:
    """Read text as JSON or YAML where the key takes a list or a mapping; pydantic reads text, numbers and switches."""
    if not isinstance(value, str):
        return value
    choices = get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in choices and value.strip().lower() in ("", "none", "null", "~"):
        return None
    if not any(get_origin(choice) in (list, dict) for choice in choices):
        return value
    # YAML reads nearly all JSON, but 1e-5 as text.
    for read, failure in ((json.loads, ValueError), (yaml.safe_load, yaml.YAMLError)):
        try:
            return read(value)
        except failure:
            continue
    return value


def _explain(model: type[Keys], error: ValidationError, places: Mapping[str, str]) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message + "."
    row = _row(str(first["loc"][0]), model.model_fields[str(first["loc"][0])])
    message = message[0].lower() + message[1:]
    place = places.get(row.name, "default")
    return f"{row.name}={_yaml(first['input'])} ({place}): {message}. It takes {row.type}: {row.meaning}"


def _aliases(field: Any) -> list[str]:
    return (field.json_schema_extra or {}).get("aliases", [])


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in get_args(annotation))
    if _is_union(annotation):
        return " or ".join(_type_name(choice) for choice in get_args(annotation) if choice is not type(None))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    names = {int: "integer", float: "number", str: "text", bool: "true or false", list: "list", dict: "mapping"}
    return names[get_origin(annotation) or annotation]


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


__all__ = ["COMMANDS", "Row", "SftConfig", "describe", "resolve", "save"]

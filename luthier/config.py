"""Every key of every command: its type, its default, its meaning.

Keys are flat and carry MaxText's names wherever it has one, else Hugging Face's or vLLM's. The table of keys in the
docs is made from this file. ``keys.py`` says how they are read.

Left out on purpose: checks that need jax, a model or the network.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from luthier import keys
from luthier.keys import Keys, Row, key

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Parallelism = Annotated[int, Field(ge=-1)]
Columns = list[str] | dict[str, str]


class ProcessKeys(Keys):
    """What every command that computes has."""

    seed: int = key(0, "Seed of everything random: initialisation, shuffling, the held-out split, sampling.", ge=0)
    jax_cache_dir: str = key("~/.cache/luthier/jax", "Folder of compiled programs, kept between runs; empty: none.")


class RunKeys(ProcessKeys):
    """Where a run lives and how it reports."""

    run_name: str = key("sft", "Name of the run: its folder under `base_output_directory`.", min_length=1)
    base_output_directory: str = key("runs", "Folder that holds runs.", min_length=1)
    log_period: PositiveInt = key(1, "Steps between rows of `metrics.jsonl` and TensorBoard.")
    profiler: Literal["", "xplane"] = key("", "`xplane` writes a trace for TensorBoard's profile plug-in.")
    skip_first_n_steps_for_profiler: int = key(2, "Steps before the trace starts.", ge=0)
    profiler_steps: PositiveInt = key(3, "Steps that the trace covers.")


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
    attention: Literal["auto", "blockwise", "cudnn", "splash"] = key(
        "auto", "Attention kernel; `auto` takes the platform's best."
    )
    scan_layers: bool = key(True, "Accepted for MaxText's sake; layers are always stacked and scanned.")
    ici_data_parallelism: Parallelism = key(1, "Devices along the `data` axis (replicas); -1: the rest.")
    ici_fsdp_parallelism: Parallelism = key(-1, "Devices along the `fsdp` axis (sharded weights); -1: the rest.")
    ici_tensor_parallelism: Parallelism = key(1, "Devices along the `tensor` axis (split matmuls); -1: the rest.")

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        axes = ("ici_data_parallelism", "ici_fsdp_parallelism", "ici_tensor_parallelism")
        if any(getattr(self, axis) == 0 for axis in axes):
            raise ValueError("ici_*_parallelism=0: give a number of devices, or -1 for the rest")
        if sum(getattr(self, axis) == -1 for axis in axes) > 1:
            raise ValueError("more than one ici_*_parallelism is -1: only one axis can take the rest")
        return self


class TemplateKeys(Keys):
    """How messages become text."""

    use_chat_template: bool = key(True, "Render conversations by the chat template; off: contents are joined as text.")
    chat_template: str = key("", "Jinja chat template to use in place of the tokenizer's.")
    chat_template_path: str = key("", "File of one: `.jinja`, or JSON with a `chat_template` field.")

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.chat_template and self.chat_template_path:
            raise ValueError("chat_template and chat_template_path are both set: keep one")
        return self


class DatasetKeys(TemplateKeys):
    """Which dataset, and what of its rows."""

    hf_path: str = key(
        "",
        "Dataset: hub id, folder that `datasets` saved, `.jsonl .json .parquet .csv` files (globs too), or "
        "`reasoning_gym:TASK`.",
        "dataset_name",
    )
    hf_name: str | None = key(None, "Subset (configuration) of a hub dataset.")
    train_data_columns: Columns | None = key(
        None,
        'Columns to read, such as `[\'messages\']` or `{"prompt": "input", "completion": "output"}`. '
        "Default: recognised from the dataset.",
    )
    formatting_func_path: str = key(
        "", "Function that rewrites a row first: `package.module.function` or `path/to/file.py:function`."
    )
    formatting_func_kwargs: dict[str, Any] = key({}, "Keyword arguments for it.")
    sft_train_on_completion_only: bool = key(
        True, "Train on assistant turns and their end token alone; off: on everything but padding."
    )


class DataKeys(DatasetKeys):
    """Which of its splits, and how rows become tokens."""

    train_split: str = key("train", "Split to train on; slices such as `train[:90%]` too.")
    hf_eval_path: str = key("", "Held-out dataset, if it is not a split of `hf_path`.")
    hf_eval_split: str = key("", "Held-out split. Default: `eval_fraction` of the training split.", "eval_split")
    eval_fraction: float = key(0.0, "Share of the training split that is held out where no split is named.", ge=0, lt=1)
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
    weight_dtype: Literal["float32", "bfloat16"] = key("float32", "Type of the trained weights in memory.")
    remat_policy: Literal["full", "dots", "none"] = key(
        "dots", "What the backward pass recomputes: all, all but matmuls and attention, or nothing."
    )
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


class SampleKeys(Keys):
    """How tokens are drawn, and when a completion ends."""

    temperature: float | None = key(
        None,
        "Logits are divided by it; 0: always the likeliest token. Default: the model's `generation_config.json`, "
        "else 1.",
        "decode_sampling_temperature",
        ge=0,
    )
    top_k: int | None = key(
        None,
        "Draw from this many likeliest tokens; 0: from all. Default: the model's `generation_config.json`, else 0.",
        "decode_sampling_top_k",
        ge=0,
    )
    top_p: float | None = key(
        None,
        "Draw from the likeliest tokens that together have this probability. Default: the model's "
        "`generation_config.json`, else 1.",
        "decode_sampling_nucleus_p",
        gt=0,
        le=1,
    )
    min_p: float | None = key(
        None,
        "Draw from tokens with at least this share of the likeliest one's probability. Default: the model's "
        "`generation_config.json`, else 0.",
        ge=0,
        le=1,
    )
    max_new_tokens: PositiveInt = key(256, "Tokens in a completion at most.", "max_tokens")
    stop: list[Annotated[str, Field(min_length=1)]] = key(
        [], "Texts that end a completion; they are not part of its text."
    )
    stop_token_ids: list[int] | None = key(
        None, "Tokens that end a completion. Default: the end tokens of the model and of its tokenizer."
    )
    ignore_eos: bool = key(False, "End completions by length alone.")


class EngineKeys(Keys):
    """The engine that samples: how much at a time, in how much memory."""

    max_num_seqs: int = key(
        0, "Sequences sampled at a time; 0: as many as there are, up to what the platform does well.", ge=0
    )
    max_target_length: int = key(
        0, "Tokens of prompt and completion together; 0: the model's own limit.", "max_model_len", ge=0
    )
    kv_cache_gib: float | None = key(
        None, "Memory for keys and values on each device, in GiB. Default: a share of what is free.", gt=0
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "Type of cached keys and values; `auto`: that of the computation."
    )
    prefill_chunk_length: int = key(512, "Tokens of prompts that are read at a time.", ge=16)
    decode_steps: PositiveInt = key(16, "Tokens sampled on the device between two looks of the host.")


class SftConfig(TrainKeys, DataKeys, ModelKeys, RunKeys):
    """The keys of `luthier sft`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_model(self)
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
        return self


class InferenceKeys(SampleKeys, EngineKeys, TemplateKeys, ModelKeys, ProcessKeys):
    """What the commands that sample share."""

    @model_validator(mode="after")
    def _check_inference(self) -> Self:
        _check_model(self)
        if self.max_target_length and self.max_new_tokens >= self.max_target_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in max_target_length="
                f"{self.max_target_length}: lower the first or raise the second"
            )
        return self


class GenerateConfig(InferenceKeys):
    """The keys of `luthier generate`."""

    prompt: str = key("", "The prompt: a user's message, or with `use_chat_template=false` text to go on with.")
    prompts_path: str = key(
        "",
        "File of prompts: `.txt` (one a line), or rows (`.jsonl .json .parquet .csv`) with a `prompt`, `messages`, "
        "`conversations` or `question` column, each a text or a list of messages.",
    )
    system_prompt: str = key("", "System message before each prompt that has none.")
    num_generations: PositiveInt = key(1, "Completions of each prompt.", "num_return_sequences", "n")
    logprobs: int | None = key(
        None, "Write each token's log-probability, and this many likelier alternatives; null: none.", ge=0, le=20
    )
    output_path: str = key(
        "", "File to write JSON lines to. Default: standard output; on a terminal the text alone, as it comes."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.prompt) == bool(self.prompts_path):
            which = "both set: keep one" if self.prompt else "both empty: set one"
            raise ValueError(f"prompt and prompts_path are {which}")
        return self


class ChatConfig(InferenceKeys):
    """The keys of `luthier chat`."""

    system_prompt: str = key("", "System message that a conversation starts with.")
    compare: list[str] = key([], "Further models, as `load_parameters_path` names one, that answer side by side.")


class EvalConfig(InferenceKeys, DatasetKeys):
    """The keys of `luthier eval`."""

    run_name: str = key("eval", "Name of the evaluation: its folder under `base_output_directory`.", min_length=1)
    base_output_directory: str = key("runs", "Folder that holds runs.", min_length=1)
    hf_eval_split: str = key(
        "",
        "Split to evaluate on; slices such as `test[:100]` too. Default: `test`, else `validation`, else the first.",
        "eval_split",
    )
    reward_functions: list[str] = key(
        [],
        "What scores completions: built-in names, `package.module.function` or `path/to/file.py:function`. Empty: the "
        "verifier of `reasoning_gym:TASK`; elsewhere nothing is sampled, and the rows' own tokens are scored.",
    )
    system_prompt: str = key("", "System message before prompts that have none.")
    num_generations: PositiveInt = key(1, "Completions of each prompt.", "num_return_sequences", "n")
    pass_at_k: list[int] = key([], "The k of pass@k and maj@k. Default: 1, 2, 4, ... up to `num_generations`.")
    pass_threshold: float = key(1.0, "Reward from which a completion passes.")
    per_device_batch_size: PositiveInt = key(
        4, "Rows of tokens scored at a time on each device of the `data` and `fsdp` axes."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.hf_path:
            raise ValueError("no dataset: set hf_path=... (a hub id, a saved folder or files)")
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(
                f"num_generations={self.num_generations} at temperature=0 gives the same completion each time: raise "
                "the temperature, or take one"
            )
        for k in self.pass_at_k:
            if not 1 <= k <= self.num_generations:
                raise ValueError(f"pass_at_k={k}: give numbers from 1 to num_generations={self.num_generations}")
        return self


class ServeConfig(InferenceKeys):
    """The keys of `luthier serve`."""

    host: str = key(
        "127.0.0.1", "Address to listen on; `api_key` is needed where other machines reach it.", min_length=1
    )
    port: int = key(8000, "Port to listen on; 0: any free one.", ge=0, le=65535)
    api_key: str | None = key(
        None, "Key that requests must bring (`Authorization: Bearer ...`); best set as LUTHIER_API_KEY.", repr=False
    )
    served_model_name: str = key(
        "", "What requests call the model. Default: its hub id, or the name of its folder or file."
    )
    max_queue: PositiveInt = key(256, "Completions that may wait to begin; requests for more get status 429.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.api_key and not _is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached by other machines: set api_key (best as LUTHIER_API_KEY in the "
                "environment), or host=127.0.0.1"
            )
        return self


COMMANDS: dict[str, type[Keys]] = {
    "sft": SftConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "eval": EvalConfig,
    "serve": ServeConfig,
}


def _check_model(config: ModelKeys) -> None:
    if not config.model_name and not config.load_parameters_path:
        raise ValueError("no model: set model_name=... or load_parameters_path=... (a folder, hub id or .gguf)")
    if config.load_parameters_path == "random" and not config.model_name:
        raise ValueError("load_parameters_path=random needs model_name=... for its config.json and tokenizer")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def resolve(command: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Return the frozen configuration of ``command``; see ``keys.read``."""
    return keys.read(COMMANDS[command], arguments, environment)


def describe(command: str) -> dict[str, list[Row]]:
    """Return the keys of ``command`` by group."""
    return keys.table(COMMANDS[command])

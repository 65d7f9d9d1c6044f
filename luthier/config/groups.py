"""Groups of keys that commands share.

Left out on purpose: what only one command has, which stands with that command.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from luthier.keys import Keys, key

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Parallelism = Annotated[int, Field(ge=-1)]
Columns = list[str] | dict[str, str]


class ProcessKeys(Keys):
    """What every command that computes has."""

    seed: int = key(0, "Seed of everything random: initialisation, shuffling, the held-out split, sampling.", ge=0)
    jax_cache_dir: str = key("~/.cache/luthier/jax", "Folder of compiled programs, kept between runs; empty: none.")


class HostKeys(Keys):
    """Of how many processes a run is one, where no launcher says so (SLURM, GKE, SkyPilot, Open MPI, TPU hosts)."""

    coordinator_address: str = key(
        "", "Host and port of process 0, such as `10.0.0.1:8476`, for a run of several.", saved=False
    )
    num_processes: PositiveInt | None = key(
        None, "Processes of the run, one a host. Default: the launcher's, else 1.", saved=False
    )
    process_id: int | None = key(None, "Number of this process, from 0. Default: the launcher's.", saved=False, ge=0)
    jax_distributed_initialization_timeout: PositiveInt = key(
        300, "Seconds that processes wait for each other at start."
    )
    jax_distributed_heartbeat_timeout_seconds: PositiveInt = key(
        60, "Seconds without a sign of life after which a process counts as dead, and the others end."
    )

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        host, _, port = self.coordinator_address.rpartition(":")
        if self.coordinator_address and not (host and port.isdigit()):
            raise ValueError(f"coordinator_address={self.coordinator_address}: give HOST:PORT, such as 10.0.0.1:8476")
        count, number = self.num_processes, self.process_id
        if count is not None and number is not None and number >= count:
            raise ValueError(f"process_id={number}: num_processes={count} are numbered from 0 to {count - 1}")
        return self


class RunKeys(HostKeys, ProcessKeys):
    """Where a run lives and how it reports."""

    run_name: str = key("sft", "Name of the run: its folder under `base_output_directory`.", min_length=1)
    base_output_directory: str = key("runs", "Folder that holds runs.", min_length=1)
    log_period: PositiveInt = key(1, "Steps between rows of `metrics.jsonl` and TensorBoard.")
    profiler: Literal["", "xplane"] = key("", "`xplane` writes a trace for TensorBoard's profile plug-in.")
    skip_first_n_steps_for_profiler: int = key(2, "Steps before the trace starts.", ge=0)
    profiler_steps: PositiveInt = key(3, "Steps that the trace covers.")


class SourceKeys(Keys):
    """Which model."""

    model_name: str = key("", "Hub id, local folder or MaxText name of the model; says where to load from by itself.")
    load_parameters_path: str = key(
        "",
        "Hugging Face folder, hub id, `.gguf` file, MaxText checkpoint or Luthier run to start from; `random` starts "
        "from random weights with the `config.json` of `model_name`. Default: `model_name`.",
    )
    tokenizer_path: str = key("", "Folder or hub id of the tokenizer. Default: the model's own.")
    hf_access_token: str | None = key(None, "Hub token. Default: the one that `hf auth login` stored.", repr=False)


class ModelKeys(SourceKeys):
    """In which numbers, on which mesh."""

    dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "Type of the computation; `auto`: bfloat16 where the platform has a fast bfloat16 matmul."
    )
    float32_activations: Literal["auto", "none", "residual", "attention"] = key(
        "auto",
        "What stays fp32 where `dtype` is bfloat16: `residual`, the stream that layers add to; `attention`, that, all "
        "of attention, and what an MLP's first products give. `auto`: `attention` in `luthier rl` with its own engine "
        "on a CPU, else `none`.",
    )
    attention: Literal["auto", "blockwise", "cudnn", "splash"] = key(
        "auto", "Attention kernel; `auto` takes the platform's best."
    )
    scan_layers: bool = key(True, "Accepted for MaxText's sake; layers are always stacked and scanned.")
    ici_data_parallelism: Parallelism = key(1, "Devices along the `data` axis (replicas); -1: the rest.")
    ici_fsdp_parallelism: Parallelism = key(-1, "Devices along the `fsdp` axis (sharded weights); -1: the rest.")
    ici_expert_parallelism: Parallelism = key(
        1, "Devices along the `expert` axis (experts, and rows, split between them); -1: the rest."
    )
    ici_context_parallelism: Parallelism = key(
        1, "Devices along the `context` axis (each row's tokens, and weights, split between them); -1: the rest."
    )
    ici_tensor_parallelism: Parallelism = key(1, "Devices along the `tensor` axis (split matmuls); -1: the rest.")
    dcn_data_parallelism: Parallelism = key(
        1, "Slices along the `data` axis: sets of devices, or processes, with a slow network between; -1: the rest."
    )
    dcn_fsdp_parallelism: Parallelism = key(1, "Slices along the `fsdp` axis; -1: the rest.")
    dcn_expert_parallelism: Parallelism = key(1, "Slices along the `expert` axis; -1: the rest.")
    dcn_context_parallelism: Parallelism = key(1, "Slices along the `context` axis; -1: the rest.")
    dcn_tensor_parallelism: Parallelism = key(1, "Slices along the `tensor` axis; -1: the rest.")
    context_parallel_strategy: Literal["all_gather", "ring"] = key(
        "all_gather",
        "How keys and values reach the queries of the `context` axis's other devices: all at once, or in turns.",
    )

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        for network, what in (("ici", "devices"), ("dcn", "slices")):
            axes = [name for name in type(self).model_fields if name.startswith(f"{network}_")]
            if any(getattr(self, axis) == 0 for axis in axes):
                raise ValueError(f"{network}_*_parallelism=0: give a number of {what}, or -1 for the rest")
            if sum(getattr(self, axis) == -1 for axis in axes) > 1:
                raise ValueError(f"more than one {network}_*_parallelism is -1: only one axis can take the rest")
        return self

    @model_validator(mode="after")
    def _check_ring(self) -> Self:
        if self.context_parallel_strategy == "ring" and self.attention in ("cudnn", "splash"):
            raise ValueError(
                f"context_parallel_strategy=ring has no attention={self.attention}: "
                "leave attention at auto, or take context_parallel_strategy=all_gather"
            )
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


class SplitKeys(DatasetKeys):
    """Which of its splits."""

    train_split: str = key("train", "Split to train on; slices such as `train[:90%]` too.")
    hf_eval_path: str = key("", "Held-out dataset, if it is not a split of `hf_path`.")
    hf_eval_split: str = key("", "Held-out split. Default: `eval_fraction` of the training split.", "eval_split")
    eval_fraction: float = key(0.0, "Share of the training split that is held out where no split is named.", ge=0, lt=1)
    enable_data_shuffling: bool = key(True, "Shuffle rows by the seed, anew each epoch.")


class MaskKeys(TemplateKeys):
    """Which tokens of a conversation count."""

    sft_train_on_completion_only: bool = key(
        True, "Train on assistant turns and their end token alone; off: on everything but padding."
    )


class DataKeys(MaskKeys, SplitKeys):
    """How rows become tokens."""

    max_target_length: int = key(1024, "Tokens in a row of the batch.", ge=2)
    packing: bool = key(True, "Pack several conversations into a row (best fit); off: one a row, padded.")
    overlong_rows: Literal["truncate", "drop"] = key("truncate", "What happens to rows over `max_target_length`.")
    grain_worker_count: int = key(1, "Processes that tokenise and read ahead; 0: none, in this process.", ge=0)


class TrainKeys(Keys):
    """The step, the optimizer, and what is kept."""

    steps: int = key(
        -1, "Optimizer steps; -1: as many as `num_epoch` gives. Where both are given, the first reached ends the run."
    )
    num_epoch: Annotated[float, Field(gt=0)] | None = key(
        None, "Passes over the training split. Default: one, or no limit where `steps` is given."
    )
    per_device_batch_size: PositiveInt = key(
        4, "Rows of a micro-batch on each device of the `data`, `fsdp` and `expert` axes."
    )
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
    load_balance_loss_weight: float = key(
        0.0, "Weight of the loss that spreads tokens evenly over the experts of a mixture.", ge=0
    )
    router_z_loss_weight: float = key(
        0.0, "Weight of the loss that keeps the logits of a mixture's router small.", ge=0
    )
    eval_interval: int = key(-1, "Steps between evaluations on the held-out rows; -1: at the start and the end.", ge=-1)
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


class CapacityKeys(Keys):
    """How much is sampled at a time, in how much memory."""

    max_num_seqs: int = key(
        0, "Sequences sampled at a time; 0: as many as there are, up to what the platform does well.", ge=0
    )
    max_target_length: int = key(
        0, "Tokens of prompt and completion together; 0: the model's own limit.", "max_model_len", ge=0
    )
    kv_cache_gib: float | None = key(
        None, "Memory for keys and values on each device, in GiB. Default: a share of what is free.", gt=0
    )


class EngineKeys(CapacityKeys):
    """How the embedded engine samples."""

    kv_cache_dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "Type of cached keys and values; `auto`: that which attention is computed in."
    )
    prefill_chunk_length: int = key(512, "Tokens of prompts that are read at a time.", ge=16)
    decode_steps: PositiveInt = key(16, "Tokens sampled on the device between two looks of the host.")


def check_model(config: SourceKeys) -> None:
    """Raise ValueError where no model is named."""
    if not config.model_name and not config.load_parameters_path:
        raise ValueError("no model: set model_name=... or load_parameters_path=... (a folder, hub id or .gguf)")
    if config.load_parameters_path == "random" and not config.model_name:
        raise ValueError("load_parameters_path=random needs model_name=... for its config.json and tokenizer")


def check_training(config: TrainKeys) -> None:
    """Raise ValueError for keys of training that cannot be, alone or together."""
    if config.steps == 0 or config.steps < -1:
        raise ValueError(f"steps={config.steps}: give a positive number, or -1 for as many as num_epoch gives")
    if config.eval_interval == 0:
        raise ValueError("eval_interval=0: give a number of steps, or -1 for one at the start and one at the end")
    if config.lr_schedule_type == "wsd" and config.warmup_steps_fraction + config.wsd_decay_steps_fraction > 1:
        raise ValueError("warmup_steps_fraction and wsd_decay_steps_fraction add up to more than 1: lower one")

"""The keys of the commands that sample from a model: `luthier generate`, `chat`, `eval` and `serve`."""

from __future__ import annotations

import ipaddress
from typing import Any, Self

from pydantic import model_validator

from luthier.config.groups import (
    DatasetKeys,
    EngineKeys,
    MaskKeys,
    ModelKeys,
    PositiveInt,
    ProcessKeys,
    SampleKeys,
    TemplateKeys,
    check_model,
)
from luthier.config.lora import QuantisationKeys
from luthier.config.vllm import VllmKeys, check_engine
from luthier.keys import key

COMPUTING = ("attention", "float32_activations", "context_parallel_strategy")
"""Keys of how a model is computed: vLLM, which is sent its weights alone, goes its own way."""


class InferenceKeys(SampleKeys, EngineKeys, TemplateKeys, QuantisationKeys, ModelKeys, ProcessKeys):
    """What the commands that sample share."""

    lora_path: str = key(
        "",
        "Adapter to sample with: a folder in PEFT's layout, or a run that trained one. The weights stay as they are; "
        "`luthier convert` merges it into them.",
        "lora_restore_path",
        "lora.lora_restore_path",
    )

    @model_validator(mode="after")
    def _check_inference(self) -> Self:
        check_model(self)
        # The default, which a saved recipe holds too, asks for nothing: completions then end where the room does.
        asked = self.max_new_tokens != type(self).model_fields["max_new_tokens"].default
        if asked and self.max_target_length and self.max_new_tokens >= self.max_target_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in max_target_length="
                f"{self.max_target_length}: lower the first or raise the second"
            )
        return self


class GenerateConfig(VllmKeys, InferenceKeys):
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
        check_engine(self, *COMPUTING)
        if bool(self.prompt) == bool(self.prompts_path):
            which = "both set: keep one" if self.prompt else "both empty: set one"
            raise ValueError(f"prompt and prompts_path are {which}")
        return self


class ChatConfig(InferenceKeys):
    """The keys of `luthier chat`."""

    system_prompt: str = key("", "System message that a conversation starts with.")
    compare: list[str] = key([], "Further models, as `load_parameters_path` names one, that answer side by side.")


class EvalConfig(VllmKeys, InferenceKeys, MaskKeys, DatasetKeys):
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
    reward_kwargs: dict[str, dict[str, Any]] = key({}, "Settings of reward functions, by name.")
    system_prompt: str = key("", "System message before prompts that have none.")
    num_generations: PositiveInt = key(1, "Completions of each prompt.", "num_return_sequences", "n")
    pass_at_k: list[int] = key([], "The k of pass@k and maj@k. Default: 1, 2, 4, ... up to `num_generations`.")
    pass_threshold: float = key(1.0, "Reward from which a completion passes.")
    per_device_batch_size: PositiveInt = key(
        4, "Rows of tokens scored at a time on each device of the `data` and `fsdp` axes."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_engine(self, *COMPUTING)
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
        "",
        "What requests call the model. Default: the name of `lora_path`'s folder, else its hub id, or the name of its "
        "folder or file.",
    )
    lora_modules: dict[str, str] = key(
        {},
        "Adapters to serve beside the model, `{name: path}`: each is a model of its own to requests, by its name.",
    )
    max_queue: PositiveInt = key(256, "Completions that may wait to begin; requests for more get status 429.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.api_key and not _is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached by other machines: set api_key (best as LUTHIER_API_KEY in the "
                "environment), or host=127.0.0.1"
            )
        if self.lora_path and self.lora_modules:
            raise ValueError("lora_path and lora_modules are both set: give the adapter of lora_path a name among them")
        if "" in self.lora_modules or self.served_model_name in self.lora_modules:
            raise ValueError(f"lora_modules={self.lora_modules}: each needs a name of its own, other than the model's")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""The keys of `luthier rl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from luthier.config.groups import (
    EngineKeys,
    Fraction,
    ModelKeys,
    PositiveInt,
    RunKeys,
    SampleKeys,
    SplitKeys,
    TrainKeys,
    check_model,
    check_training,
)
from luthier.config.lora import LoraKeys, check_adapter
from luthier.config.vllm import COLDEST, VllmKeys, check_engine
from luthier.keys import Keys, key

GSM8K = "openai/gsm8k"
TOOLS = ("calculator",)
"""The built-in environments, which answer the model and reward nothing."""


class PolicyKeys(Keys):
    """The policy step: which loss, on which completions. What is left open follows from `loss_algo`."""

    loss_algo: Literal["grpo", "dr-grpo", "dapo", "gspo", "gspo-token", "cispo", "rloo", "reinforce"] = key(
        "grpo", "Algorithm: its loss, and its habits for all keys below that are null.", "loss_type"
    )
    prompts_per_step: PositiveInt = key(8, "Prompts that a step samples completions of.", "batch_size")
    num_generations: PositiveInt = key(8, "Completions of each prompt: its group.", "group_size")
    num_iterations: PositiveInt = key(1, "Passes over a step's completions.")
    num_mini_batches: PositiveInt = key(1, "Optimizer updates in a pass, each on a part of the prompts.")
    row_length: int = key(
        0, "Tokens in a packed row of the policy step; 0: what a group or an update takes, up to 2048.", ge=0
    )
    advantages: Literal["group-std", "group-mean", "leave-one-out", "batch-mean", "batch-std"] | None = key(
        None,
        "What a reward is held against: its group's mean, over the group's or the whole batch's standard deviation; "
        "the group's mean alone; the others of its group; the batch's mean.",
    )
    epsilon_low: Annotated[float, Field(ge=0)] | None = key(
        None, "How far the probability ratio may fall below 1 before it is clipped.", "epsilon", "grpo_epsilon"
    )
    epsilon_high: Annotated[float, Field(ge=0)] | None = key(None, "How far it may rise above 1.")
    dual_clip: Annotated[float, Field(gt=1)] | None = key(
        None, "Greatest ratio that counts where the advantage is negative (dual clip).", "delta"
    )
    loss_aggregation: Literal["sequence", "token", "constant"] | None = key(
        None,
        "Mean over each completion's tokens and then over completions; over all tokens of the update; or the sum over "
        "tokens, divided by `max_new_tokens` and the number of completions.",
    )
    beta: float = key(0.0, "Weight of the KL divergence from the model that the run started from.", "grpo_beta", ge=0)
    kl_estimator: Literal["k1", "k2", "k3", "k3-iw"] = key(
        "k3-iw", "Its estimator; `k3-iw` is weighted by the probability ratio, which makes its gradient unbiased."
    )
    entropy_coefficient: float = key(0.0, "Weight of the entropy bonus.", ge=0)
    log_entropy: bool = key(False, "Log the policy's entropy, which takes some time to compute.")
    importance_sampling_correction: Literal["auto", "none", "token", "sequence"] = key(
        "auto",
        "Correct for the sampler not being the trainer's policy: weigh tokens by their probability ratio, cut at the "
        "cap, or leave out completions whose ratio is over it. `auto`: `token` where sampler and trainer can differ by "
        "more than rounding.",
    )
    importance_sampling_cap: float = key(2.0, "Greatest such ratio.", gt=0)
    routing_replay: bool = key(
        False, "Send tokens to the experts that the sampler sent them to; for mixtures of experts."
    )
    max_logp_difference: float = key(
        0.05, "Warn where log-probs of sampler and trainer differ by more than this on average.", gt=0
    )
    zero_variance_groups: Literal["keep", "drop", "resample"] | None = key(
        None, "What happens to groups whose rewards are all alike, from which nothing can be learnt."
    )
    max_resamples: int = key(3, "Further tries, each of the prompts that are missing, where such are resampled.", ge=0)
    truncated_completions: Literal["keep", "mask", "penalize"] | None = key(
        None,
        "What happens to completions that `max_new_tokens` cut off: nothing, no loss on them, or a penalty that grows "
        "to 1 over the last `overlong_buffer` tokens.",
    )
    overlong_buffer: int = key(0, "Tokens over which that penalty grows; 0: a fifth of `max_new_tokens`.", ge=0)


class RewardKeys(Keys):
    """What completions are rewarded for."""

    reward_functions: list[str] = key(
        [],
        "Built-in names, `package.module.function` or `path/to/file.py:function`. Empty: the reward of an environment "
        "of your own, the verifier of `reasoning_gym:TASK`, else `math`.",
    )
    reward_weights: list[float] = key([], "Weight of each; empty: 1 each.")
    reward_kwargs: dict[str, dict[str, Any]] = key({}, "Settings of reward functions, by name.")
    reward_timeout: float = key(60.0, "Seconds that a reward function may take for a group.", gt=0)
    reward_workers: int = key(0, "Processes that compute rewards; 0: one a processor core, at most 8.", ge=0)
    max_reward_failures: Fraction = key(0.5, "Share of a step's rewards that may fail before the run stops.")
    environment: str = key(
        "", "What answers the model, for several turns: `calculator`, or a class as for `reward_functions`."
    )
    environment_kwargs: dict[str, Any] = key({}, "Keyword arguments for it.")
    max_turns: PositiveInt = key(8, "Turns of the model in an episode.")


class RolloutKeys(Keys):
    """Who samples, how far ahead, and what is looked at."""

    system_prompt: str = key("", "System message before prompts that have none.")
    max_prompt_length: int = key(
        0, "Leave out rows whose prompt has more tokens; 0: none.", "max_prefill_predict_length", ge=0
    )
    chips_per_vm: int = key(0, "Devices of this host to use; 0: all.", ge=0)
    max_staleness: int = key(
        0, "Steps that the sampler's weights may be behind; from 1 on, sampler and trainer work side by side.", ge=0
    )
    sampler_devices_fraction: Fraction = key(
        0.5, "Share of the devices that sample, with `max_staleness` or with vLLM's servers on this host."
    )
    trainer_devices_fraction: Fraction = key(0.5, "Share of the devices that train, where others sample.")
    weight_sync_interval: PositiveInt = key(1, "Steps between two times that vLLM's servers are sent new weights.")
    interrupted_completions: Literal["keep", "drop"] = key(
        "keep",
        "What becomes of completions that new weights find unfinished on vLLM's servers: they go on, or are dropped "
        "and drawn anew.",
    )
    log_completions_steps: int = key(10, "Steps between printing the best and the worst completion; 0: never.", ge=0)
    eval_num_generations: PositiveInt = key(1, "Completions of each held-out prompt.")
    eval_temperature: Annotated[float, Field(ge=0)] | None = key(
        None, "Temperature of evaluations. Default: `temperature`."
    )
    pass_threshold: float = key(1.0, "Reward from which a completion passes.")


class RlConfig(
    PolicyKeys,
    RewardKeys,
    RolloutKeys,
    VllmKeys,
    SampleKeys,
    EngineKeys,
    LoraKeys,
    TrainKeys,
    SplitKeys,
    ModelKeys,
    RunKeys,
):
    """The keys of `luthier rl`."""

    run_name: str = key("rl", "Name of the run: its folder under `base_output_directory`.", min_length=1)
    hf_path: str = key(
        GSM8K,
        "Dataset of prompts: hub id, folder that `datasets` saved, `.jsonl .json .parquet .csv` files (globs too), or "
        "`reasoning_gym:TASK`.",
        "dataset_name",
    )
    temperature: float = key(1.0, "Logits are divided by it.", "decode_sampling_temperature", gt=0)
    top_k: int = key(0, "Draw from this many likeliest tokens; 0: from all.", "decode_sampling_top_k", ge=0)
    top_p: float = key(
        1.0,
        "Draw from the likeliest tokens that together have this probability.",
        "decode_sampling_nucleus_p",
        gt=0,
        le=1,
    )
    min_p: float = key(0.0, "Draw from tokens with at least this share of the likeliest one's probability.", ge=0, le=1)
    max_new_tokens: PositiveInt = key(256, "Tokens in a completion at most.", "max_tokens", "max_completion_length")
    per_device_batch_size: PositiveInt = key(
        1, "Packed rows of a micro-batch on each device of the `data` and `fsdp` axes."
    )
    learning_rate: float = key(1e-6, "Peak learning rate.", gt=0)
    lr_schedule_type: Literal["constant", "linear", "cosine", "wsd"] = key(
        "constant", "Schedule after the warm-up.", "learning_rate_schedule"
    )
    warmup_steps_fraction: Fraction = key(0.0, "Share of the steps spent warming up.")

    @property
    def filters(self) -> list[str]:
        """The keys that leave tokens out of what completions are drawn from."""
        on = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return [name for name, is_on in on.items() if is_on]

    @property
    def environment_rewards(self) -> bool:
        """Whether rewards come from the environment, too."""
        return self.environment not in ("", *TOOLS)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """GSM8K has two configurations on the hub, so its default needs a name."""
        own = values.get("hf_path", GSM8K) == GSM8K
        return {"hf_name": "main", **values} if own else dict(values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model(self)
        check_training(self)
        check_adapter(self)
        check_engine(self)
        for check in (_groups, _lengths, _devices, _rewards, _dropout, _vllm, _sync):
            if message := check(self):
                raise ValueError(message)
        return self


def _groups(config: RlConfig) -> str | None:
    if config.num_generations == 1 and config.advantages not in ("batch-mean", "batch-std"):
        alone = config.loss_algo != "reinforce" or config.advantages is not None
        if alone:
            return (
                "num_generations=1: a completion alone has no group to be held against. Give at least 2, or "
                "loss_algo=reinforce"
            )
    if config.num_generations == 1 and config.zero_variance_groups in ("drop", "resample"):
        return (
            f"zero_variance_groups={config.zero_variance_groups} leaves nothing with num_generations=1, where no group "
            "has any variance: leave it out"
        )
    if config.prompts_per_step % config.num_mini_batches:
        return (
            f"num_mini_batches={config.num_mini_batches} does not divide prompts_per_step={config.prompts_per_step}: "
            "choose a divisor"
        )
    if config.eval_num_generations > 1 and config.eval_temperature == 0:
        return (
            f"eval_num_generations={config.eval_num_generations} at eval_temperature=0 gives the same completion each "
            "time: raise the temperature, or take one"
        )
    return None


def _lengths(config: RlConfig) -> str | None:
    if config.max_target_length and config.max_new_tokens >= config.max_target_length:
        return (
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in max_target_length="
            f"{config.max_target_length}: lower the first or raise the second"
        )
    if config.row_length and config.row_length <= config.max_new_tokens:
        return (
            f"row_length={config.row_length} has no room for a prompt and max_new_tokens={config.max_new_tokens}: "
            "raise it"
        )
    if config.overlong_buffer >= config.max_new_tokens:
        return (
            f"overlong_buffer={config.overlong_buffer} must be under max_new_tokens={config.max_new_tokens}: lower it"
        )
    return None


def _devices(config: RlConfig) -> str | None:
    shares = (config.sampler_devices_fraction, config.trainer_devices_fraction)
    if (config.max_staleness or config.starts_servers) and (min(shares) <= 0 or sum(shares) > 1):
        return (
            f"sampler_devices_fraction={shares[0]} and trainer_devices_fraction={shares[1]}: both must be over 0, and "
            "together at most 1"
        )
    return None


def _vllm(config: RlConfig) -> str | None:
    """Return what is wrong of keys that vLLM's servers have no part in."""
    if config.rollout_engine != "vllm":
        return None
    if config.filters:
        name = config.filters[0]
        return (
            f"{name}={getattr(config, name)} with rollout_engine=vllm: vLLM says how likely a token was among those "
            "that are left, and the policy loss needs to know how likely it was among all. Leave it out"
        )
    coldest = {"temperature": config.temperature, "eval_temperature": config.eval_temperature or 1.0}
    if name := next((name for name, value in coldest.items() if value < COLDEST), None):
        return f"{name}={getattr(config, name)} with rollout_engine=vllm, which takes {COLDEST} and more. Raise it"
    if config.routing_replay:
        return (
            "routing_replay=true with rollout_engine=vllm: only the embedded engine records which experts it sent "
            "tokens to. Leave one of the two out"
        )
    if config.starts_servers and config.chips_per_vm:
        return (
            f"chips_per_vm={config.chips_per_vm} with rollout_engine=vllm: servers and trainer share what "
            "CUDA_VISIBLE_DEVICES names, by sampler_devices_fraction and trainer_devices_fraction. Leave it out"
        )
    return None


def _sync(config: RlConfig) -> str | None:
    interval, staleness = config.weight_sync_interval, config.max_staleness
    if config.rollout_engine == "local" and interval > 1:
        return f"weight_sync_interval={interval}: the embedded engine has the trainer's own weights. Leave it out"
    if config.rollout_engine == "local" and config.interrupted_completions == "drop":
        return "interrupted_completions=drop is for rollout_engine=vllm: set that too, or leave it out"
    if staleness and interval > staleness + 1:
        return (
            f"weight_sync_interval={interval} with max_staleness={staleness}: new weights are needed every "
            f"{staleness + 1} steps. Lower the one or raise the other"
        )
    return None


def _dropout(config: RlConfig) -> str | None:
    if config.lora_dropout:
        return (
            f"lora_dropout={config.lora_dropout}: what is sampled without dropout would be scored with it, and the "
            "policy be held against another: leave it out"
        )
    return None


def _rewards(config: RlConfig) -> str | None:
    count, weights = len(config.reward_functions) + config.environment_rewards, len(config.reward_weights)
    count = count or 1  # the default function
    if weights and weights != count:
        also = ", the last for the environment's own" if config.environment_rewards else ""
        return f"reward_weights has {weights} numbers for {count} rewards: give one for each{also}"
    unknown = [name for name in config.reward_kwargs if not any(name in path for path in config.reward_functions)]
    if unknown and config.reward_functions:
        return f"reward_kwargs: {unknown[0]} is none of reward_functions={config.reward_functions}"
    return None

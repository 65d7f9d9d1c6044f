"""MaxText's names of released models as ids on the hub, and of modules as Hugging Face's: its commands work unchanged.

The ids are those that MaxText's own converter takes, or that its model files point to; where it takes somebody's bf16
copy of a quantised release, the release itself, which is read here. Left out on purpose: its names without released
weights (gpt3-*, envy-*, *-tiny, *-test, *-custom).
"""

from __future__ import annotations

import re

from luthier.errors import UserError

HUB_IDS = {
    "deepseek2-16b": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek2-236b": "deepseek-ai/DeepSeek-V2",
    "deepseek3-671b": "deepseek-ai/DeepSeek-V3",
    "deepseek3-671b-2dfsdp": "deepseek-ai/DeepSeek-V3",
    "deepseek3-671b-batchsplit": "deepseek-ai/DeepSeek-V3",
    "deepseek3.2-671b": "deepseek-ai/DeepSeek-V3.2",
    "deepseek4-284b": "deepseek-ai/DeepSeek-V4-Flash",
    "gemma-2b": "google/gemma-2b",
    "gemma-7b": "google/gemma-7b",
    "gemma2-2b": "google/gemma-2-2b",
    "gemma2-9b": "google/gemma-2-9b",
    "gemma2-27b": "google/gemma-2-27b",
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-12b": "google/gemma-3-12b-it",
    "gemma3-27b": "google/gemma-3-27b-it",
    "gemma4-26b": "google/gemma-4-26b-a4b-it",
    "gemma4-31b": "google/gemma-4-31b-it",
    "gemma4-e2b": "google/gemma-4-E2B-it",
    "gemma4-e4b": "google/gemma-4-E4B-it",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "kimi-k2-1t": "moonshotai/Kimi-K2-Instruct",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama3.1-70b-Instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "llama3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama4-17b-16e": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "llama4-17b-128e": "meta-llama/Llama-4-Maverick-17B-128E",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "olmo3-7b": "allenai/Olmo-3-7B-Instruct",
    "olmo3-7b-pt": "allenai/Olmo-3-1025-7B",
    "olmo3-32b": "allenai/Olmo-3-32B-Think",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-1.7b-base": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-4b-base": "Qwen/Qwen3-4B-Base",
    "qwen3-4b-thinking-2507": "Qwen/Qwen3-4B-Thinking-2507",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-8b-base": "Qwen/Qwen3-8B-Base",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-14b-base": "Qwen/Qwen3-14B-Base",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B-Thinking-2507",
    "qwen3-30b-a3b-base": "Qwen/Qwen3-30B-A3B-Base",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B-Thinking-2507",
    "qwen3-480b-a35b": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "qwen3-next-80b-a3b": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3-omni-30b-a3b": "Qwen/Qwen3-Omni-30B-A3B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-30b-a3b": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B",
    "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B",
}

_MODULES = {
    "q_proj": ("self_attention/query", "attention/query", "self_attention/wq"),
    "k_proj": ("self_attention/key", "attention/key"),
    "v_proj": ("self_attention/value", "attention/value"),
    "o_proj": ("self_attention/out", "attention/out"),
    "qkv_proj": ("self_attention/qkv_proj", "attention/qkv_proj"),
    "gate_proj": ("mlp/wi_0", "MoeBlock_0/wi_0"),
    "up_proj": ("mlp/wi_1", "MoeBlock_0/wi_1"),
    "gate_up_proj": ("mlp/wi", "MoeBlock_0/wi"),
    "down_proj": ("mlp/wo", "MoeBlock_0/wo"),
    "q_a_proj": ("self_attention/wq_a",),
    "q_b_proj": ("self_attention/wq_b",),
    "kv_a_proj_with_mqa": ("self_attention/wkv_a",),
    "kv_b_proj": ("self_attention/wkv_b",),
}


def modules(pattern: str) -> tuple[str, ...]:
    """Return the names of Hugging Face's modules that a regular expression over MaxText's paths means.

    An example is ``decoder/layers/(self_attention/(query|value)|mlp/(wi_0|wi_1|wo))``. Raises UserError where it means
    none.
    """
    found = tuple(
        name
        for name, paths in _MODULES.items()
        if any(re.search(rf"(?:{pattern})$", f"decoder/layers/{path}") for path in paths)
    )
    if not found:
        known = ", ".join(paths[0] for paths in _MODULES.values())
        raise UserError(f"lora_target_modules={pattern}: means no module. Of MaxText's paths there are {known}.")
    return found

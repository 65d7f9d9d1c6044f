"""Tiny models of each family in MaxText's layout: what Hugging Face's `config.json` and MaxText's keys say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from folders import spec_of

from luthier.checkpoint.tensors import Stored, write_safetensors
from luthier.model import param
from tiny import LLAMA31_ROPE, TINY, tokenizer

_SIZES = TINY | {"vocab_size": 272, "head_dim": 16, "rms_norm_eps": 1e-5, "bos_token_id": 0}
_QWEN = _SIZES | {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
_GEMMA = _SIZES | {"rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_GEMMA = {name: value for name, value in _GEMMA.items() if name != "rope_theta"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2-7b": _SIZES,
    "llama3.1-8b": _SIZES
    | {"rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE | {"original_max_position_embeddings": 8192}},
    "mistral-7b": _SIZES
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_theta": 1e6, "sliding_window": None},
    "mixtral-8x7b": _SIZES
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "rope_theta": 1e6, "num_local_experts": 4,
       "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2.5-7b": _QWEN | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen2.5-1.5b": _QWEN
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3-0.6b": _QWEN | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen3-30b-a3b": _QWEN
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "rope_theta": 1e7, "num_experts": 4,
       "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    "gemma-2b": _GEMMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "rope_theta": 1e4},
    "gemma2-2b": _GEMMA
    | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "rope_theta": 1e4, "num_hidden_layers": 4,
       "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 50.0,
       "final_logit_softcapping": 30.0},
    "gemma3-4b": _GEMMA
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 8,
       "query_pre_attn_scalar": 16, "sliding_window": 8, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
       "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}  # fmt: skip


def arguments(name: str) -> list[str]:
    """Return what MaxText's command has to be told, so that its model of that name is as tiny."""
    config = CONFIGS[name]
    layers = config["num_hidden_layers"]
    told = {
        "base_emb_dim": config["hidden_size"],
        "base_num_query_heads": config["num_attention_heads"],
        "base_num_kv_heads": config["num_key_value_heads"],
        "base_mlp_dim": config["intermediate_size"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "base_num_decoder_layers": layers // 2 if name.startswith("gemma2") else layers,
    }
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        told |= {"base_moe_mlp_dim": config["intermediate_size"], "num_experts": experts, "num_experts_per_tok": 2}
    if config.get("sliding_window"):
        told["sliding_window_size"] = config["sliding_window"]
    return [f"{key}={value}" for key, value in told.items()]


def multimodal(config: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` around a Gemma 3's text model, as its larger releases have it."""
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {name: value for name, value in config.items() if name != "architectures"},
        "vision_config": vision,
    }


def tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return random weights of eleven bits, which are the same whatever makes the random numbers into floats."""
    random = np.random.default_rng(0)
    found = {}
    for name, shape in param.tensor_shapes(spec_of(config)).items():
        norm = len(shape) == 1 and "norm" in name and not config["model_type"].startswith("gemma")
        found[name] = (random.integers(-1024, 1024, shape) / 2048 * 0.5 + norm).astype(np.float32).astype(dtype)
    return found


def write_model(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """Write a model in Hugging Face's layout, with a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: Stored(value.shape, value.dtype, lambda value=value: value) for name, value in weights.items()}
    write_safetensors(folder / "model.safetensors", stored)
    tokenizer().save_pretrained(folder)
    return folder

"""Adapters as PEFT makes and saves them, over tiny Transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_variants import VARIANTS
from folders import tiny_tokenizer, write_folder

from luthier.checkpoint import tokenizer as tokenizer_lib
from tiny import KINDS, TINY, stored_tensors, torch_twin

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "llama": TINY | {"num_hidden_layers": 2},
    "qwen3-moe": KINDS["qwen3-moe"] | {"num_hidden_layers": 2},
    "deepseek-v3": KINDS["deepseek-v3"],
    "phi3": VARIANTS["phi3"].config,
    "gpt-oss": VARIANTS["gpt-oss"].config,
    "gemma3": VARIANTS["gemma3"].config,
    "mixtral": VARIANTS["mixtral"].config,
}
# {name: (model, what LoraConfig is told)}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "regex": ("llama", {"target_modules": r".*\.self_attn\.[qk]_proj"}),
    "dropout": ("llama", {"target_modules": ["o_proj"], "lora_dropout": 0.25}),
    "experts": ("qwen3-moe", {"target_modules": [], "target_parameters": EXPERTS}),
    "one-experts": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "all-and-experts": ("qwen3-moe", {"target_modules": LINEAR[:4], "target_parameters": EXPERTS[::-1]}),
    "regex-and-experts": ("qwen3-moe", {"target_modules": r".*\.[qv]_proj", "target_parameters": EXPERTS[:1]}),
    "deepseek": ("deepseek-v3", {"target_modules": LATENT, "target_parameters": EXPERTS}),
    "short-names": ("deepseek-v3", {"target_modules": ["q_a_proj", "down_proj"]}),
    "joined": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "joined-dora": ("phi3", {"target_modules": "all-linear", "use_dora": True}),
    "fused": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "mixtral": ("mixtral", {"target_modules": LINEAR[:4], "target_parameters": EXPERTS}),
    "multimodal": ("gemma3", {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
}

_FAST = ("rslora", "dora", "experts", "joined")
CASES = [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in ADAPTERS]


def write_base(folder: Path, config: dict[str, Any]) -> Any:
    """Write Transformers' model of this config as a checkpoint with a tokenizer, and return it."""
    model = torch_twin(config)
    write_folder(folder, config, stored_tensors(model))
    tokenizer_lib.save(tiny_tokenizer(), folder)
    return model


def write_adapter(folder: Path, model: Any, rank: int = 4, seed: int = 0, **told: Any) -> Any:
    """Adapt Transformers' model as PEFT does, with random numbers, save that, and return PEFT's model."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    import torch

    settings = peft.LoraConfig(r=rank, lora_alpha=7, task_type="CAUSAL_LM", **told)
    adapted = peft.get_peft_model(model, settings).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn_like(weight))
            elif "magnitude" in name:
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    return adapted

"""What each of llama.cpp's architectures is in Hugging Face's terms: ``config.json`` and the names of tensors.

The keys and names are those that llama.cpp's converter writes; what it leaves to its runtime (Gemma's pattern of
layers, the scale of its 27B models) is stated here as there. Left out on purpose: Mistral 3's own architecture,
DeepSeek's, and whatever is not a plain decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.checkpoint.gguf_file import Header
from luthier.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_JOINED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Of tensors that stack experts, one tensor each comes.
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    ``names`` maps the tensors of a block; ``fields`` returns what its ``config.json`` has besides what all have.
    ``interleaved``: rows of q and k are ordered for pairs that lie side by side. ``plus_one``: norms are stored with
    one added. ``also`` are model types that are written so besides, where nothing in them is another's.
    """

    model_type: str
    hf_class: str
    names: Mapping[str, str]
    fields: Callable[[Header], dict[str, Any]]
    interleaved: bool = False
    plus_one: bool = False
    also: tuple[str, ...] = ()

    @property
    def experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any("{expert}" in name for name in self.names.values())

    def hf_name(self, name: str) -> str:
        """Return Hugging Face's name of a tensor, with ``{expert}`` where it stacks them; its own where unknown."""
        stem, _, suffix = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{suffix}"
        block, _, part = stem.removeprefix("blk.").partition(".")
        if stem.startswith("blk.") and part in self.names:
            return f"model.layers.{block}.{self.names[part]}.{suffix}"
        return name

    def gguf_name(self, name: str) -> str:
        """Return the name that llama.cpp gives a tensor: ``hf_name`` backwards, without the number of an expert.

        Raises KeyError for a tensor that the architecture has no place for.
        """
        stem, _, suffix = name.rpartition(".")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
            part = re.sub(r"\bexperts\.\d+\.", "experts.{expert}.", match[2])
            return f"blk.{match[1]}.{_flipped(self.names)[part]}.{suffix}"
        return f"{_flipped(_OUTER)[stem]}.{suffix}"


def of_model_type(model_type: str, place: str) -> tuple[str, Architecture]:
    """Return llama.cpp's name of the architecture that a ``model_type`` is written as, and what it is.

    Raises UserError where there is none, or none that is known here.
    """
    for key, found in _ARCHITECTURES.items():
        if model_type in (found.model_type, *found.also):
            return key.split(",")[0], found
    known = sorted({name for found in _ARCHITECTURES.values() for name in (found.model_type, *found.also)})
    raise UserError(
        f"{place}: model type `{model_type}` cannot be written as GGUF. Those that can: {', '.join(known)}. "
        "Write a Hugging Face folder (output_format=huggingface) and convert that with llama.cpp's own script."
    )


def _flipped(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def find(header: Header) -> Architecture:
    """Return the architecture of a file. Raises UserError where it is not supported."""
    name = header.architecture
    key = "llama, of experts" if name == "llama" and header.get("expert_count", 0) else name
    if key not in _ARCHITECTURES:
        known = [name for name in _ARCHITECTURES if "," not in name]
        raise UserError(f"{header.path}: GGUF architecture `{name}` is not supported. Supported: {', '.join(known)}.")
    found = _ARCHITECTURES[key]
    if bool(header.get("expert_count", 0)) != found.experts:
        kind = "a mixture of experts" if not found.experts else "no mixture of experts"
        raise UserError(f"{header.path}: {kind}, which is not supported for architecture `{name}`.")
    _check(header)
    return found


def config(header: Header) -> dict[str, Any]:
    """Return the ``config.json`` that ``header`` describes.

    Raises UserError for an architecture, a rotary scaling or a layout that is not supported.
    """
    found, metadata = find(header), header.metadata
    heads = header.get("attention.head_count")
    result = {
        "architectures": [found.hf_class],
        "model_type": found.model_type,
        "vocab_size": header.entries["token_embd.weight"].shape[0],
        "hidden_size": header.get("embedding_length"),
        "num_hidden_layers": header.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "max_position_embeddings": header.get("context_length"),
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": header.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(header),
        "tie_word_embeddings": "output.weight" not in header.entries,
        "dtype": "float32",
    }
    if (size := header.get("feed_forward_length")) is not None:
        result["intermediate_size"] = size
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    result |= {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in ids.items()}
    return result | found.fields(header)


def _head_dim(header: Header) -> int:
    return header.get("attention.key_length") or header.get("embedding_length") // header.get("attention.head_count")


def _llama(header: Header) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "head_dim": header.get("attention.key_length") or header.get("rope.dimension_count") or _head_dim(header),
        "attention_bias": "blk.0.attn_q.bias" in header.entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.entries,
    }


def _mixtral(header: Header) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "head_dim": header.get("attention.key_length") or header.get("rope.dimension_count") or _head_dim(header),
        "num_local_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "sliding_window": None,
    }


def _qwen2(header: Header) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(header: Header) -> dict[str, Any]:
    return _qwen2(header) | {"head_dim": _head_dim(header), "attention_bias": False}


def _qwen3_moe(header: Header) -> dict[str, Any]:
    return _qwen3(header) | {
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "num_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(header: Header) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": _head_dim(header),
        "attention_bias": False,
    }


def _gemma2(header: Header, period: int = 2, layers_of_27b: int = 46) -> dict[str, Any]:
    period = header.get("attention.sliding_window_pattern") or period
    window, count = header.get("attention.sliding_window"), header.get("block_count")
    types = ["sliding_attention" if window and (i + 1) % period else "full_attention" for i in range(count)]
    by_heads = header.get("embedding_length") // header.get("attention.head_count")
    return _gemma(header) | {
        "query_pre_attn_scalar": by_heads if count == layers_of_27b else _head_dim(header),
        "attn_logit_softcapping": header.number("attn_logit_softcapping"),
        "final_logit_softcapping": header.number("final_logit_softcapping"),
        "sliding_window": window,
        "layer_types": types,
    }


def _gemma3(header: Header) -> dict[str, Any]:
    local = header.number("rope.freq_base_swa", 10_000.0)
    return _gemma2(header, 6, 62) | {"rope_local_base_freq": local, "use_bidirectional_attention": False}


def _phi3(header: Header) -> dict[str, Any]:
    length = header.get("rope.scaling.original_context_length") or header.get("context_length")
    return {
        "hidden_act": "silu",
        "original_max_position_embeddings": length,
        "partial_rotary_factor": (header.get("rope.dimension_count") or _head_dim(header)) / _head_dim(header),
        "sliding_window": header.get("attention.sliding_window") or None,
    }


_ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _ATTENTION | _MLP, _llama, interleaved=True, also=("mistral",)),
    "llama, of experts": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        _ATTENTION | {"ffn_norm": _MLP["ffn_norm"]} | _MIXTRAL_EXPERTS,
        _mixtral,
        interleaved=True,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _ATTENTION | _MLP, _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _ATTENTION | _MLP | _QK_NORM, _qwen3),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _ATTENTION | _MLP | _QK_NORM | _EXPERTS, _qwen3_moe),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _ATTENTION | _MLP, _gemma, plus_one=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _ATTENTION | _MLP | _FOUR_NORMS, _gemma2, plus_one=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _ATTENTION | _MLP | _FOUR_NORMS | _QK_NORM, _gemma3, plus_one=True
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _ATTENTION | _MLP | _JOINED, _phi3),
}


def _check(header: Header) -> None:
    name = header.architecture
    if header.metadata.get("split.count", 1) > 1:
        raise UserError(f"{header.path}: one part of a split file. Merge it first: `llama-gguf-split --merge`.")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(header.get(key), list):
            raise UserError(f"{header.path}: {name}.{key} differs between layers, which is not supported.")
    wanted = ("embedding_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon")
    missing = [f"{name}.{key}" for key in wanted if header.get(key) is None]
    if "token_embd.weight" not in header.entries:
        missing.append("tensor token_embd.weight")
    if missing:
        raise UserError(f"{header.path}: incomplete GGUF file, without {', '.join(missing)}.")


def _rope_scaling(header: Header) -> dict[str, Any] | None:
    if ROPE_FACTORS in header.entries:
        return _llama3_scaling(header)
    if LONG_FACTORS in header.entries:
        factors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
        read = {key: [float(str(value)) for value in header.values(name)] for key, name in factors.items()}
        return {"rope_type": "longrope", "type": "longrope"} | read
    kind = header.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        settings = {"rope_type": kind, "factor": header.number("rope.scaling.factor")}
        length = header.get("rope.scaling.original_context_length")
        return settings | ({"original_max_position_embeddings": length} if kind == "yarn" and length else {})
    if kind != "none":
        raise UserError(
            f"{header.path}: rope scaling `{kind}` is not supported. Supported: none, linear, llama3, longrope, yarn."
        )
    return None


def _llama3_scaling(header: Header) -> dict[str, Any] | None:
    """Recover Llama 3.1's settings from the factor that llama.cpp stores for each frequency.

    The largest factor is the setting; the band between is fixed by the published low and high factors over 8192
    positions, which all Llama 3 releases share. What those do not reproduce is refused.
    """
    given = header.values(ROPE_FACTORS)
    if np.all(given == 1):
        return None
    theta, low, high, length = header.get("rope.freq_base", 10_000.0), 1.0, 4.0, 8192
    factor = float(str(given.max()))
    turns = length / (2 * math.pi * theta ** (np.arange(len(given)) / len(given)))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(1 / (smooth + (1 - smooth) / factor), given, rtol=1e-4):
        raise UserError(f"{header.path}: {ROPE_FACTORS} is not Llama 3's rope scaling, which is not supported.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }

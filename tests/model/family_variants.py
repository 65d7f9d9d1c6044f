"""Every variant of every family that is proved equal to Transformers, as a tiny `config.json`.

A variant is what a released model's `config.json` says, made small: a period and a rest of layers, a window shorter
than the test's rows, groups of experts. Fields are written as Transformers 5 writes them; a variant named "... old"
has them as the checkpoints on the hub still do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiny import CONFIGS

Config = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A ``config.json`` and the released models that are like it."""

    config: Config
    models: str


def _config(model_type: str, architecture: str, **fields: Any) -> Config:
    base = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,  # torch gives the embedding of such a token no gradient
    }
    return base | fields


def _rope(theta: float = 10_000.0, **more: Any) -> Config:
    return {"rope_type": "default", "rope_theta": theta} | more


def _layers(pattern: str) -> list[str]:
    """Return ``layer_types``: s slides, f is full."""
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in pattern]


YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _mistral(**fields: Any) -> Config:
    return _config("mistral", "MistralForCausalLM", hidden_act="silu", rope_parameters=_rope(), head_dim=16) | fields


def _ministral3() -> Config:
    """Positions are stretched, and past the 16th queries grow with them."""
    stretched = {"original_max_position_embeddings": 16, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    growth = {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 512}
    return _mistral(
        model_type="ministral3",
        architectures=["Ministral3ForCausalLM"],
        sliding_window=None,
        rope_parameters=YARN | {"rope_theta": 1e6} | stretched | growth,
    )


def _mistral3(text: Config) -> Config:
    return {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": _without(text, "architectures"),
        "vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 10,
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _mixtral(**fields: Any) -> Config:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
    rope = {"rope_parameters": _rope(1e6)}
    base = _config("mixtral", "MixtralForCausalLM", hidden_act="silu", sliding_window=None, head_dim=None)
    return base | experts | rope | fields


def _smollm3(**fields: Any) -> Config:
    base = _config("smollm3", "SmolLM3ForCausalLM", hidden_act="silu", tie_word_embeddings=True)
    own = {"num_hidden_layers": 5, "layer_types": _layers("fffff"), "rope_parameters": _rope(5e6)}
    return base | {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False} | own | fields


def _qwen2(**fields: Any) -> Config:
    slides = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
    base = _config("qwen2", "Qwen2ForCausalLM", hidden_act="silu", rms_norm_eps=1e-6)
    return base | slides | {"rope_parameters": _rope(1e6), "layer_types": _layers("fff")} | fields


def _qwen3(**fields: Any) -> Config:
    base = _qwen2(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32, attention_bias=False)
    return base | fields


def _qwen3_moe(**fields: Any) -> Config:
    base = _config("qwen3_moe", "Qwen3MoeForCausalLM", hidden_act="silu", rms_norm_eps=1e-6, head_dim=16)
    experts = {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    slides = {"use_sliding_window": False, "sliding_window": None}
    return base | experts | slides | {"attention_bias": False, "rope_parameters": _rope(1e6)} | fields


def _gemma(**fields: Any) -> Config:
    base = _config("gemma", "GemmaForCausalLM", rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=32)
    activation = {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}
    return base | activation | {"num_key_value_heads": 1, "rope_parameters": _rope()} | fields


def _gemma2(**fields: Any) -> Config:
    own = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "layer_types": _layers("sfsfs"),
    }
    return _without(_gemma(), "hidden_act") | own | fields


GEMMA3_ROPES = {
    "full_attention": _rope(1e6, rope_type="linear", factor=8.0),
    "sliding_attention": _rope(1e4),
}


def _gemma3(**fields: Any) -> Config:
    own = {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 7,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "layer_types": _layers("ssfssfs"),
        "rope_parameters": GEMMA3_ROPES,
    }
    return _gemma2() | own | fields


def _deepseek_v2(**fields: Any) -> Config:
    latent = {
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "attention_bias": False,
    }
    experts = {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "num_hidden_layers": 4,
    }
    base = _config("deepseek_v2", "DeepseekV2ForCausalLM", hidden_act="silu", rms_norm_eps=1e-6)
    return base | latent | experts | {"rope_parameters": _rope()} | fields


GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def _deepseek_v3(**fields: Any) -> Config:
    own = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 20,
        "n_shared_experts": 1,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 2,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
    }
    return _without(_deepseek_v2(), "topk_method") | own | GROUPS | fields


def _gpt_oss(**fields: Any) -> Config:
    base = _config("gpt_oss", "GptOssForCausalLM", hidden_act="silu", head_dim=16, attention_bias=True)
    own = {
        "num_hidden_layers": 5,
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 1.5,
        "sliding_window": 8,
        "layer_types": _layers("sfsfs"),
        "rope_parameters": YARN | {"rope_theta": 150_000.0, "truncate": False},
    }
    return base | own | fields


def _olmo2(**fields: Any) -> Config:
    base = _config("olmo2", "Olmo2ForCausalLM", hidden_act="silu", attention_bias=False)
    return base | {"rms_norm_eps": 1e-6, "rope_parameters": _rope(5e5)} | fields


def _olmo3(**fields: Any) -> Config:
    own = {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "layer_types": _layers("sssfss"),
        "rope_parameters": {"sliding_attention": _rope(5e5), "full_attention": YARN | {"rope_theta": 5e5}},
    }
    return _olmo2() | own | fields


def _phi3(**fields: Any) -> Config:
    base = _config("phi3", "Phi3ForCausalLM", hidden_act="silu")
    own = {"sliding_window": None, "original_max_position_embeddings": 512}
    return base | own | {"rope_parameters": _rope(partial_rotary_factor=1.0)} | fields


def _longrope(pairs: int, original: int) -> Config:
    factors = {
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.5 * i for i in range(pairs)],
    }
    return {"rope_type": "longrope", "original_max_position_embeddings": original} | factors


def _without(config: Config, *names: str) -> Config:
    return {name: value for name, value in config.items() if name not in names}


def _old(config: Config, *more: str, **fields: Any) -> Config:
    """Return ``config`` as older checkpoints have it: without the fields of Transformers 5."""
    return _without(config, "rope_parameters", "layer_types", *more) | fields


_PHI3_LONG = {"max_position_embeddings": 1024, "rope_parameters": _longrope(8, 512) | {"rope_theta": 1e4}}
_PHI4_MINI = {"num_attention_heads": 2, "head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True}

VARIANTS: dict[str, Variant] = {
    "llama2": Variant(CONFIGS["llama2"], "Llama 2"),
    "llama3": Variant(CONFIGS["llama3"], "Llama 3"),
    "llama3.1": Variant(CONFIGS["llama3.1"], "Llama 3.1, 3.2, 3.3"),
    "llama-linear-rope": Variant(CONFIGS["llama-linear-rope"], "Llama, linearly stretched"),
    "llama-biased": Variant(CONFIGS["llama-biased"], "Llama with biases"),
    "smollm2": Variant(CONFIGS["smollm2"], "SmolLM2"),
    "smollm3": Variant(_smollm3(no_rope_layers=[1, 1, 0, 1, 1]), "SmolLM3"),
    "smollm3-window": Variant(
        _smollm3(
            use_sliding_window=True,
            sliding_window=8,
            no_rope_layers=[1, 1, 0, 1, 1],
            layer_types=_layers("ffsff"),
            attention_bias=True,
            mlp_bias=True,
        ),
        "SmolLM3 with its window in use",
    ),
    "smollm3-old": Variant(_old(_smollm3(no_rope_layer_interval=3), rope_theta=5e6), "SmolLM3"),
    "qwen2": Variant(_qwen2(), "Qwen2, Qwen2.5"),
    "qwen2-old": Variant(_old(_qwen2(), rope_theta=1e6, tie_word_embeddings=True), "Qwen2, Qwen2.5 as on the hub"),
    "qwen2-yarn": Variant(
        _old(_qwen2(), rope_theta=1e6, rope_scaling={"type": "yarn"} | _without(YARN, "rope_type")), "Qwen2.5 with YaRN"
    ),
    "qwen2-window": Variant(
        _qwen2(
            num_hidden_layers=5,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
            layer_types=_layers("ffsss"),
        ),
        "Qwen2 with its window in use",
    ),
    "qwen2-window-old": Variant(
        _old(
            _qwen2(num_hidden_layers=5),
            rope_theta=1e6,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
        ),
        "Qwen2 with its window in use, as on the hub",
    ),
    "qwen3": Variant(_qwen3(), "Qwen3"),
    "qwen3-biased": Variant(_qwen3(attention_bias=True, tie_word_embeddings=True), "Qwen3 with biases"),
    "qwen3-moe": Variant(_qwen3_moe(), "Qwen3-30B-A3B, Qwen3-235B-A22B"),
    "qwen3-moe-old": Variant(
        _old(_qwen3_moe(norm_topk_prob=False), "num_local_experts", rope_theta=1e6, num_experts=8),
        "Qwen3-MoE as on the hub, without normed weights",
    ),
    "qwen3-moe-mixed": Variant(
        _qwen3_moe(num_hidden_layers=6, mlp_only_layers=[1], decoder_sparse_step=2),
        "Qwen3-MoE with dense layers among the others",
    ),
    "qwen3-moe-window": Variant(
        _qwen3_moe(use_sliding_window=True, sliding_window=8), "Qwen3-MoE with its window in use"
    ),
    "gemma": Variant(_gemma(), "Gemma 1"),
    "gemma-old": Variant(
        _without(
            _old(_gemma(num_key_value_heads=4), rope_theta=1e4, hidden_act="gelu", hidden_activation=None),
            "tie_word_embeddings",
        ),
        "Gemma 1 as on the hub",
    ),
    "gemma2": Variant(_gemma2(), "Gemma 2"),
    "gemma2-old": Variant(
        _without(_old(_gemma2(), rope_theta=1e4, hidden_act="gelu_pytorch_tanh"), "tie_word_embeddings"),
        "Gemma 2 as on the hub",
    ),
    "gemma3-text": Variant(_gemma3(), "Gemma 3 270M, 1B"),
    "gemma3-text-old": Variant(
        _without(
            _old(
                _gemma3(),
                sliding_window_pattern=3,
                rope_theta=1e6,
                rope_local_base_freq=1e4,
                rope_scaling={"rope_type": "linear", "factor": 8.0},
            ),
            "tie_word_embeddings",
        ),
        "Gemma 3 text as on the hub",
    ),
    "gemma3": Variant(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": _without(_gemma3(), "architectures"),
            "vision_config": _TOWER | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "boi_token_index": 253,
            "eoi_token_index": 254,
            "image_token_index": 255,
            "tie_word_embeddings": True,
        },
        "Gemma 3 4B, 12B, 27B: the text tower",
    ),
    "mistral": Variant(_mistral(sliding_window=None, head_dim=32), "Mistral 7B v0.2, v0.3, Nemo, Small 24B"),
    "mistral-window": Variant(_mistral(sliding_window=8), "Mistral 7B v0.1"),
    "mistral-old": Variant(
        _old(_mistral(sliding_window=12), "head_dim", rope_theta=1e4), "Mistral 7B v0.1 as on the hub"
    ),
    "ministral": Variant(
        _mistral(
            model_type="ministral",
            architectures=["MinistralForCausalLM"],
            num_hidden_layers=6,
            sliding_window=8,
            layer_types=_layers("fsssfs"),
        ),
        "Ministral 8B",
    ),
    "ministral3": Variant(_ministral3(), "Ministral 3 (3B, 8B, 14B), text alone"),
    "mistral3": Variant(
        _mistral3(_mistral(sliding_window=None, head_dim=32)), "Mistral Small 3.1, 3.2: the text tower"
    ),
    "mistral3-ministral3": Variant(_mistral3(_ministral3()), "Ministral 3 with its tower for images"),
    "mixtral": Variant(_mixtral(), "Mixtral 8x7B, 8x22B"),
    "mixtral-old": Variant(_old(_mixtral(sliding_window=8), "head_dim", rope_theta=1e6), "Mixtral with a window"),
    "deepseek-v2-lite": Variant(
        _deepseek_v2(
            rope_parameters=YARN | {"rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        "DeepSeek-V2-Lite, DeepSeek-Coder-V2-Lite",
    ),
    "deepseek-v2": Variant(
        _deepseek_v2(q_lora_rank=20, topk_method="group_limited_greedy", attention_bias=True, **GROUPS),
        "DeepSeek-V2, V2.5",
    ),
    "deepseek-v2-old": Variant(
        _old(
            _deepseek_v2(q_lora_rank=20, topk_method="group_limited_greedy", **GROUPS),
            rope_theta=1e4,
            rope_scaling=_without(YARN, "rope_type") | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7},
            moe_layer_freq=1,
            scoring_func="softmax",
        ),
        "DeepSeek-V2 as on the hub",
    ),
    "deepseek-v3": Variant(_deepseek_v3(), "DeepSeek-V3, R1"),
    "deepseek-v3-old": Variant(
        _old(
            _deepseek_v3(norm_topk_prob=False, attention_bias=True),
            "rope_interleave",
            rope_theta=1e4,
            rope_scaling=_without(YARN, "rope_type") | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0},
            moe_layer_freq=1,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
        ),
        "DeepSeek-V3 as on the hub",
    ),
    "deepseek-v3-halves": Variant(
        _deepseek_v3(q_lora_rank=None, rope_interleave=False, rope_parameters=_rope()),
        "DeepSeek-V3 without neighbouring pairs or small queries",
    ),
    "gpt-oss": Variant(_gpt_oss(), "gpt-oss 20B, 120B"),
    "gpt-oss-old": Variant(
        _old(_gpt_oss(), rope_theta=150_000.0, rope_scaling=YARN | {"truncate": False}), "gpt-oss as on the hub"
    ),
    "olmo2": Variant(_olmo2(), "OLMo 2"),
    "olmo2-old": Variant(_old(_olmo2(attention_bias=True), rope_theta=5e5), "OLMo 2 as on the hub, with biases"),
    "olmo3": Variant(_olmo3(), "OLMo 3"),
    "olmo3-old": Variant(
        _without(_old(_olmo3(num_hidden_layers=5), rope_theta=5e5, rope_scaling=YARN), "num_key_value_heads"),
        "OLMo 3 as on the hub",
    ),
    "phi3": Variant(_phi3(sliding_window=8), "Phi-3-mini-4k, Phi-3-medium-4k, Phi-4"),
    "phi3-longrope": Variant(_phi3(**_PHI3_LONG), "Phi-3-mini-128k, Phi-3.5-mini"),
    "phi3-longrope-long": Variant(
        _phi3(
            original_max_position_embeddings=2,
            rope_parameters=_longrope(8, 2) | {"rope_theta": 1e4, "factor": 1.5},
        ),
        "Phi-3-mini-128k, Phi-3.5-mini beyond their first length",
    ),
    "phi3-longrope-old": Variant(
        _old(
            _phi3(**_PHI3_LONG),
            rope_theta=1e4,
            rope_scaling=_without(_longrope(8, 512), "rope_type", "original_max_position_embeddings")
            | {"type": "longrope"},
        ),
        "Phi-3-mini-128k as on the hub",
    ),
    "phi4-mini": Variant(
        _without(
            _phi3(
                **_PHI4_MINI,
                max_position_embeddings=1024,
                rope_parameters=_longrope(12, 512) | {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
            ),
            "head_dim",
        ),
        "Phi-4-mini",
    ),
}

ONE_EACH = tuple({variant.config["model_type"]: name for name, variant in reversed(VARIANTS.items())}.values())
"""The first variant of each family."""

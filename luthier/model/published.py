"""The `config.json` of released models, full size: the fields that matter, under the names that the hub's files have.

So a model can be planned for, and a checkpoint without a `config.json` be read, with no network. Sizes and settings are
facts that their authors publish. ``parameters`` counts what the language model's checkpoint holds: without V3's head
for several tokens at once, and for Gemma 3's larger models without the tower for images.

Left out on purpose: tokenizers and weights, which the hub has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A released model's ``config.json``, and how many weights it has."""

    config: Config
    parameters: int


def _config(
    model_type: str, vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **fields: Any
) -> Config:
    sizes = {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    }
    return sizes | fields


def _llama31(*sizes: int) -> Config:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    more = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": rope, "max_position_embeddings": 131072}
    return _config("llama", 128256, *sizes) | more


def _qwen3_moe(*sizes: int, mlp: int, theta: float) -> Config:
    experts = {
        "head_dim": 128,
        "attention_bias": False,
        "moe_intermediate_size": mlp,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_theta": theta,
    }
    return _config("qwen3_moe", 151936, *sizes) | experts


def _gemma(*sizes: int) -> Config:
    more = {"head_dim": 256, "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "gelu"}
    return _config("gemma", 256000, *sizes) | more


def _gemma2(*sizes: int, head_dim: int, scalar: int) -> Config:
    more = {
        "model_type": "gemma2",
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return _gemma(*sizes) | more


def _gemma3(vocab: int, *sizes: int, window: int, **fields: Any) -> Config:
    own = {
        "vocab_size": vocab,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": window,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    }
    config = _config("gemma3_text", vocab, *sizes) | own | fields
    return {name: value for name, value in config.items() if name != "hidden_act"}


def _gemma3_multimodal(**fields: Any) -> Config:
    """What is left out of ``text_config`` on the hub is left out here: it is the class's default."""
    stretched = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    text = {"model_type": "gemma3_text"} | stretched | fields
    return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}


def _mistral(vocab: int, *sizes: int, window: int | None, theta: float, **fields: Any) -> Config:
    more = {"rms_norm_eps": 1e-5, "sliding_window": window, "rope_theta": theta}
    return _config("mistral", vocab, *sizes) | more | fields


def _deepseek(model_type: str, vocab: int, *sizes: int, scale: float, **fields: Any) -> Config:
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": scale,
        "mscale_all_dim": scale,
    }
    latent = {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "rope_theta": 10000,
        "rope_scaling": yarn,
        "max_position_embeddings": 163840,
    }
    return _config(model_type, vocab, *sizes) | latent | {"moe_layer_freq": 1, "norm_topk_prob": False} | fields


def _gpt_oss(layers: int, experts: int) -> Config:
    yarn = {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    more = {
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "rope_theta": 150000,
        "rope_scaling": yarn,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    }
    return _config("gpt_oss", 201088, 2880, 2880, layers, 64, 8) | more


def _olmo3() -> Config:
    yarn = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 1.2079441541679836,
    }
    more = {"sliding_window": 4096, "rope_theta": 5e5, "rope_scaling": yarn, "max_position_embeddings": 65536}
    return _config("olmo3", 100278, 4096, 11008, 32, 32, 32) | more


PUBLISHED: dict[str, Published] = {
    "meta-llama/Llama-2-7b-hf": Published(
        _config("llama", 32000, 4096, 11008, 32, 32, 32, rms_norm_eps=1e-5, rope_theta=1e4), 6_738_415_616
    ),
    "meta-llama/Llama-3.1-8B": Published(_llama31(4096, 14336, 32, 32, 8), 8_030_261_248),
    "meta-llama/Llama-3.1-70B": Published(_llama31(8192, 28672, 80, 64, 8), 70_553_706_496),
    "meta-llama/Llama-3.1-405B": Published(_llama31(16384, 53248, 126, 128, 8), 405_853_388_800),
    "HuggingFaceTB/SmolLM2-135M": Published(
        _config("llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=1e5),
        134_515_008,
    ),
    "HuggingFaceTB/SmolLM3-3B": Published(
        _config("smollm3", 128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True, rope_theta=5e6), 3_075_098_624
    ),
    "Qwen/Qwen2.5-7B": Published(
        _config("qwen2", 152064, 3584, 18944, 28, 28, 4, rope_theta=1e6, use_sliding_window=False), 7_615_616_512
    ),
    "Qwen/Qwen3-8B": Published(
        _config("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128, rope_theta=1e6), 8_190_735_360
    ),
    "Qwen/Qwen3-30B-A3B": Published(_qwen3_moe(2048, 6144, 48, 32, 4, mlp=768, theta=1e6), 30_532_122_624),
    "Qwen/Qwen3-235B-A22B": Published(_qwen3_moe(4096, 12288, 94, 64, 4, mlp=1536, theta=1e6), 235_093_634_560),
    "google/gemma-2b": Published(_gemma(2048, 16384, 18, 8, 1), 2_506_172_416),
    "google/gemma-7b": Published(_gemma(3072, 24576, 28, 16, 16), 8_537_680_896),
    "google/gemma-2-9b": Published(_gemma2(3584, 14336, 42, 16, 8, head_dim=256, scalar=256), 9_241_705_984),
    "google/gemma-2-27b": Published(_gemma2(4608, 36864, 46, 32, 16, head_dim=128, scalar=144), 27_227_128_320),
    "google/gemma-3-270m": Published(_gemma3(262144, 640, 2048, 18, 4, 1, window=512), 268_098_176),
    "google/gemma-3-1b-pt": Published(_gemma3(262144, 1152, 6912, 26, 4, 1, window=512), 999_885_952),
    "google/gemma-3-4b-pt": Published(
        _gemma3_multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 3_880_263_168
    ),
    "google/gemma-3-27b-pt": Published(
        _gemma3_multimodal(
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
        27_009_346_304,
    ),
    "mistralai/Mistral-7B-v0.1": Published(
        _mistral(32000, 4096, 14336, 32, 32, 8, window=4096, theta=1e4), 7_241_732_096
    ),
    "mistralai/Mistral-7B-v0.3": Published(
        _mistral(32768, 4096, 14336, 32, 32, 8, window=None, theta=1e6), 7_248_023_552
    ),
    "mistralai/Mistral-Small-24B-Base-2501": Published(
        _mistral(131072, 5120, 32768, 40, 32, 8, window=None, theta=1e8, head_dim=128), 23_572_403_200
    ),
    "mistralai/Mixtral-8x7B-v0.1": Published(
        _mistral(
            32000,
            4096,
            14336,
            32,
            32,
            8,
            window=None,
            theta=1e6,
            model_type="mixtral",
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        46_702_792_704,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": Published(
        _deepseek(
            "deepseek_v2",
            102400,
            2048,
            10944,
            27,
            16,
            16,
            scale=0.707,
            q_lora_rank=None,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            routed_scaling_factor=1.0,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            scoring_func="softmax",
        ),
        15_706_484_224,
    ),
    "deepseek-ai/DeepSeek-V2": Published(
        _deepseek(
            "deepseek_v2",
            102400,
            5120,
            12288,
            60,
            128,
            128,
            scale=0.707,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
            routed_scaling_factor=16.0,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            scoring_func="softmax",
        ),
        235_741_434_880,
    ),
    "deepseek-ai/DeepSeek-V3": Published(
        _deepseek(
            "deepseek_v3",
            129280,
            7168,
            18432,
            61,
            128,
            128,
            scale=1.0,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            scoring_func="sigmoid",
            num_nextn_predict_layers=1,
        ),
        671_026_419_200,
    ),
    "openai/gpt-oss-20b": Published(_gpt_oss(24, 32), 20_914_757_184),
    "openai/gpt-oss-120b": Published(_gpt_oss(36, 128), 116_829_156_672),
    "allenai/OLMo-2-1124-7B": Published(
        _config("olmo2", 100352, 4096, 11008, 32, 32, 32, rope_theta=5e5), 7_298_617_344
    ),
    "allenai/Olmo-3-1025-7B": Published(_olmo3(), 7_298_011_136),
    "microsoft/Phi-3-mini-4k-instruct": Published(
        _config(
            "phi3", 32064, 3072, 8192, 32, 32, 32, rms_norm_eps=1e-5, rope_theta=1e4, sliding_window=2047,
            original_max_position_embeddings=4096,
        ),
        3_821_079_552,
    ),
    "microsoft/phi-4": Published(
        _config("phi3", 100352, 5120, 17920, 40, 40, 10, rms_norm_eps=1e-5, rope_theta=250000), 14_659_507_200
    ),
}  # fmt: skip

SAME: dict[str, str] = {
    "meta-llama/Llama-2-7b-chat-hf": "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-405B-Instruct": "meta-llama/Llama-3.1-405B",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M",
    "Qwen/Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B",
    "google/gemma-2b-it": "google/gemma-2b",
    "google/gemma-7b-it": "google/gemma-7b",
    "google/gemma-2-9b-it": "google/gemma-2-9b",
    "google/gemma-2-27b-it": "google/gemma-2-27b",
    "google/gemma-3-270m-it": "google/gemma-3-270m",
    "google/gemma-3-1b-it": "google/gemma-3-1b-pt",
    "google/gemma-3-4b-it": "google/gemma-3-4b-pt",
    "google/gemma-3-27b-it": "google/gemma-3-27b-pt",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek-ai/DeepSeek-V2-Lite",
}
"""Releases of the same sizes: tuned ones, and what they were tuned from."""


def find(hub_id: str) -> Published | None:
    """Return the released model of that hub id, or of its sizes; None where it is not in the table."""
    return PUBLISHED.get(SAME.get(hub_id, hub_id))

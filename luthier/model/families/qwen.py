"""Qwen 2, 2.5 and 3, and Qwen 3's mixture of experts.

Left out on purpose: Qwen's multimodal checkpoints, and those whose layers are not all attention (Qwen3-Next, 3.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.moe import Moe
from luthier.model.norm import Norm
from luthier.model.reading import FULL, SLIDING, Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    rope = Rope.from_hf(config)

    def attention(kind: str) -> Grouped:
        window = fields.size("sliding_window", 4096) if kind == SLIDING else None
        if fields.model_type == "qwen2":
            return Grouped(*fields.heads(), rope, window=window, qkv_bias=True)
        biased, norm = fields.flag("attention_bias"), Norm(fields.number("rms_norm_eps", 1e-6))
        return Grouped(*fields.heads(), rope, window=window, qkv_bias=biased, o_bias=biased, qk_norm=norm)

    layers = [Layer(attention(kind), _feed(fields, i)) for i, kind in enumerate(_kinds(fields))]
    return Decoder.from_fields(fields, layers)


def _kinds(fields: Fields) -> tuple[str, ...]:
    """Return each layer's attention: where windows are used, Qwen 2's and 3's first layers have none."""
    count = fields.size("num_hidden_layers")
    if not fields.flag("use_sliding_window") or not fields.count("sliding_window", 4096):
        return (FULL,) * count
    if fields.model_type == "qwen3_moe":
        return (SLIDING,) * count
    first = fields.count("max_window_layers", 28)
    return fields.layer_types([SLIDING if i >= first else FULL for i in range(count)])


def _feed(fields: Fields, layer: int) -> Mlp | Moe:
    experts = fields.count("num_experts", fields.count("num_local_experts", 128))
    sparse = fields.model_type == "qwen3_moe" and experts and layer not in fields.integers("mlp_only_layers", ())
    if not sparse or (layer + 1) % fields.size("decoder_sparse_step", 1):
        return Mlp(fields.size("intermediate_size"))
    return Moe(
        size=fields.size("moe_intermediate_size"),
        experts=experts,
        top_k=fields.size("num_experts_per_tok", 8),
        normalised=fields.flag("norm_topk_prob"),
    )

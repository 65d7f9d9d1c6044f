"""DeepSeek V2 and V3 (and R1): latent attention, shared and routed experts after the first dense layers.

Left out on purpose: V3's head for several tokens at once, which is kept but not trained, and V3.2's sparse attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.latent import Latent
from luthier.model.mlp import Mlp
from luthier.model.moe import Moe
from luthier.model.reading import Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    attention, count = _attention(fields), fields.size("num_hidden_layers")
    dense = min(count, fields.count("first_k_dense_replace", 0))
    layers = [Layer(attention, Mlp(fields.size("intermediate_size")))] * dense
    if dense < count:
        layers += [Layer(attention, _experts(fields))] * (count - dense)
    heads = fields.some("num_nextn_predict_layers") or 0
    extra = tuple(rf"model\.layers\.{count + i}\..*" for i in range(heads))
    return Decoder.from_fields(fields, layers, ignored=extra)


def _attention(fields: Fields) -> Latent:
    interleaved = fields.model_type == "deepseek_v2" or fields.flag("rope_interleave", True)
    rope = Rope.from_hf(fields.config, interleaved=interleaved)
    return Latent(
        heads=fields.size("num_attention_heads"),
        q_rank=fields.some("q_lora_rank"),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        value_dim=fields.size("v_head_dim"),
        rope=rope,
        bias=fields.flag("attention_bias"),
    )


def _experts(fields: Fields) -> Moe:
    third = fields.model_type == "deepseek_v3"
    grouped = third or fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    size, shared = fields.size("moe_intermediate_size"), fields.some("n_shared_experts")
    return Moe(
        size=size,
        experts=fields.size("n_routed_experts", fields.some("num_local_experts")),
        top_k=fields.size("num_experts_per_tok"),
        scoring="sigmoid" if third else "softmax",
        normalised=third and fields.flag("norm_topk_prob", True),
        scaling=fields.number("routed_scaling_factor", 2.5 if third else 1.0),
        groups=fields.size("n_group", 8 if third else 1) if grouped else 1,
        top_groups=fields.size("topk_group", 4 if third else 1) if grouped else 1,
        correction=third,
        shared=Mlp(size * shared, prefix="mlp.shared_experts") if shared else None,
    )

"""gpt-oss: attention with sinks in every other layer's window, and experts with biases and a bounded gate.

Left out on purpose: training in MXFP4; released checkpoints are read as bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.moe import Clamp, Moe
from luthier.model.norm import Norm
from luthier.model.reading import FULL, SLIDING, Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("gpt_oss",)


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields(config)
    biased = fields.flag("attention_bias", True)
    rope = Rope.from_hf(config, theta=150_000.0)
    feed = _experts(fields)

    def layer(kind: str) -> Layer:
        window = fields.size("sliding_window", 128) if kind == SLIDING else None
        attention = Grouped(*fields.heads(), rope, window=window, qkv_bias=biased, o_bias=biased, sinks=True)
        return Layer(attention, feed)

    kinds = {kind: layer(kind) for kind in (FULL, SLIDING)}
    count = fields.size("num_hidden_layers")
    usual = [FULL if i % 2 else SLIDING for i in range(count)]
    layers = [kinds[kind] for kind in fields.layer_types(usual)]
    return Decoder.from_fields(fields, layers, norm=Norm(fields.number("rms_norm_eps", 1e-5)))


def _experts(fields: Fields) -> Moe:
    return Moe(
        size=fields.size("intermediate_size"),
        experts=fields.size("num_local_experts"),
        top_k=fields.size("num_experts_per_tok"),
        scoring="softmax_of_chosen",
        router_bias=True,
        clamp=Clamp(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)),
        fused=True,
        router="router",
    )

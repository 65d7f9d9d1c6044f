"""SmolLM 3: Llama's layers, of which every fourth is told no positions (arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.reading import FULL, SLIDING, Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("smollm3",)


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields({"tie_word_embeddings": True} | dict(config))
    fields.choice("hidden_act", ("silu",), "silu")
    count = fields.size("num_hidden_layers")
    every = fields.size("no_rope_layer_interval", 4)
    turned = fields.integers("no_rope_layers", [(i + 1) % every for i in range(count)], count)  # 0: no rope there
    window = fields.some("sliding_window") if fields.flag("use_sliding_window") else None
    kinds = fields.layer_types([FULL if window is None or turned[i] else SLIDING for i in range(count)])
    rope, biased = Rope.from_hf(config, theta=2e6), fields.flag("attention_bias")
    mlp = Mlp(fields.size("intermediate_size"), bias=fields.flag("mlp_bias"))

    def layer(i: int) -> Layer:
        attention = Grouped(
            *fields.heads(),
            rope if turned[i] else None,
            window=window if kinds[i] == SLIDING else None,
            qkv_bias=biased,
            o_bias=biased,
        )
        return Layer(attention, mlp)

    return Decoder.from_fields(fields, [layer(i) for i in range(count)])

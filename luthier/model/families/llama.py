"""Llama: Llama 2, 3, 3.1 to 3.3, SmolLM2, and whatever else calls itself ``llama``.

Left out on purpose: pretraining_tp, which no released checkpoint needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.reading import Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("llama",)


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    biased = fields.flag("attention_bias")
    attention = Grouped(*fields.heads(), Rope.from_hf(config), qkv_bias=biased, o_bias=biased)
    layer = Layer(attention, Mlp(fields.size("intermediate_size"), bias=fields.flag("mlp_bias")))
    return Decoder.from_fields(fields, [layer] * fields.size("num_hidden_layers"))

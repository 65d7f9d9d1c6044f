"""OLMo 2 and 3, which norm what comes out of a block and not what goes in.

Left out on purpose: OLMo 1, whose norms have no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.norm import Norm
from luthier.model.reading import FULL, SLIDING, Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("olmo2", "olmo3")
_AFTER = {
    "before_attention": None,
    "after_attention": "post_attention_layernorm",
    "before_mlp": None,
    "after_mlp": "post_feedforward_layernorm",
}


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    slides = fields.model_type == "olmo3"
    norm = Norm(fields.number("rms_norm_eps", 1e-5))
    biased = fields.flag("attention_bias")

    def layer(kind: str) -> Layer:
        attention = Grouped(
            *fields.heads(),
            _rope(config, kind) if slides else Rope.from_hf(config),
            window=fields.size("sliding_window", 4096) if kind == SLIDING else None,
            qkv_bias=biased,
            o_bias=biased,
            qk_norm=norm,
            whole_norm=True,
        )
        return Layer(attention, Mlp(fields.size("intermediate_size")), **_AFTER)

    kinds = {kind: layer(kind) for kind in (FULL, SLIDING)}
    count = fields.size("num_hidden_layers")
    usual = [SLIDING if slides and (i + 1) % 4 else FULL for i in range(count)]
    return Decoder.from_fields(fields, [kinds[kind] for kind in fields.layer_types(usual)], norm=norm)


def _rope(config: Mapping[str, Any], kind: str) -> Rope:
    """Return OLMo 3's rope: what stretches it is for full attention alone."""
    if kind == SLIDING and not config.get("rope_parameters"):
        config = {name: value for name, value in config.items() if name != "rope_scaling"}
    return Rope.from_hf(config, kind, theta=5e5)

"""Mistral: Mistral 7B to Small and Nemo, Ministral, the text tower of Mistral 3's multimodal checkpoints, and Mixtral.

Left out on purpose: the vision tower, whose tensors are kept but not trained, and Mistral 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.moe import Moe
from luthier.model.reading import FULL, SLIDING, Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("mistral", "ministral", "ministral3", "mistral3", "mixtral")


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    if config["model_type"] != "mistral3":
        return _text(config)
    outer = Fields(config)
    text = outer.text_config(("mistral", "ministral3"))
    tied = outer.flag("tie_word_embeddings", Fields(text).flag("tie_word_embeddings"))
    return replace(
        _text(text | {"tie_word_embeddings": tied}),
        prefix="language_model.model.",
        head="language_model.lm_head",
        ignored=(r"vision_tower\..*", r"multi_modal_projector\..*"),
    )


def _text(config: Mapping[str, Any]) -> Decoder:
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    rope = Rope.from_hf(config, theta=1e6 if fields.model_type == "mixtral" else 1e4)
    window, growth, feed = _window(config), _growth(fields), _feed(fields)

    def layer(kind: str) -> Layer:
        seen = window if kind == SLIDING else None
        return Layer(Grouped(*fields.heads(), rope, window=seen, growth=growth), feed)

    kinds = {kind: layer(kind) for kind in (FULL, SLIDING)}
    usual = [FULL if window is None else SLIDING] * fields.size("num_hidden_layers")
    return Decoder.from_fields(fields, [kinds[kind] for kind in fields.layer_types(usual)])


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the window: where the field is absent Mistral's class has 4096, the others none."""
    usual = {"sliding_window": 4096} if config["model_type"] == "mistral" else {}
    return Fields(usual | dict(config)).some("sliding_window")


def _growth(fields: Fields) -> tuple[float, int] | None:
    rope = Fields(fields.group("rope_parameters"))
    beta = rope.factor("llama_4_scaling_beta") if fields.model_type == "ministral3" else None
    return None if beta is None else (beta, rope.size("original_max_position_embeddings"))


def _feed(fields: Fields) -> Mlp | Moe:
    size = fields.size("intermediate_size")
    if fields.model_type != "mixtral":
        return Mlp(size)
    return Moe(
        size=size,
        experts=fields.size("num_local_experts", 8),
        top_k=fields.size("num_experts_per_tok", 2),
        normalised=True,
        prefix="block_sparse_moe",
        names=("w1", "w3", "w2"),
    )

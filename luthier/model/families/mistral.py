"""Mistral: Mistral 7B to Small and Nemo, Ministral, the text tower of Mistral 3's multimodal checkpoints, and Mixtral.

Left out on purpose: the vision tower, whose tensors are kept but not trained, and Mistral 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.errors import UserError
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
    text = config["text_config"]
    if text.get("model_type") not in ("mistral", "ministral3"):
        raise UserError(
            f"config.json: a mistral3 whose text_config is `{text.get('model_type')}` is not supported; mistral and "
            "ministral3 are."
        )
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))}
    return replace(
        _text(text | tied),
        prefix="language_model.model.",
        head="language_model.lm_head",
        ignored=(r"vision_tower\..*", r"multi_modal_projector\..*"),
    )


def _text(config: Mapping[str, Any]) -> Decoder:
    fields = Fields(config)
    fields.choice("hidden_act", ("silu",), "silu")
    sizes = fields.heads()
    rope = Rope.from_hf(config, theta=1e6 if fields.model_type == "mixtral" else 1e4)

    def layer(kind: str) -> Layer:
        window = _window(config) if kind == SLIDING else None
        return Layer(Grouped(*sizes, rope, window=window, growth=_growth(config)), _feed(fields))

    usual = FULL if _window(config) is None else SLIDING
    kinds = fields.layer_types([usual] * fields.size("num_hidden_layers"))
    return Decoder.from_fields(fields, [layer(kind) for kind in kinds])


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the window: where the field is absent Mistral's class has 4096, the others none."""
    usual = {"sliding_window": 4096} if config["model_type"] == "mistral" else {}
    return Fields(usual | dict(config)).some("sliding_window")


def _growth(config: Mapping[str, Any]) -> tuple[float, int] | None:
    rope = config.get("rope_parameters") or {}
    if config["model_type"] != "ministral3" or not rope.get("llama_4_scaling_beta"):
        return None
    fields = Fields(rope)
    return fields.number("llama_4_scaling_beta"), fields.size("original_max_position_embeddings")


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

"""Gemma 1, 2 and 3, and the text tower of Gemma 3's multimodal checkpoints.

Left out on purpose: the vision tower, whose tensors are kept but not trained; attention in both directions; and Gemma
3n and 4, whose layers share keys and values and have embeddings of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import UserError
from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.mlp import Mlp
from luthier.model.norm import Norm
from luthier.model.reading import FULL, SLIDING, Fields
from luthier.model.rope import Rope

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
_TEXT = {  # what a multimodal checkpoint's text_config leaves out: Transformers' Gemma3TextConfig
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}
_USUAL = {"head_dim": 256, "tie_word_embeddings": True}
_AROUND = {  # Gemma 1 has Llama's norms
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


def read(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a ``config.json``, with Transformers' defaults for what it leaves out.

    Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
    """
    if config["model_type"] != "gemma3":
        return _text(Fields(_USUAL | dict(config)))
    return _text(
        Fields(text_only(config)),
        prefix="language_model.model.",
        head="language_model.lm_head",
        ignored=(r"vision_tower\..*", r"multi_modal_projector\..*"),
    )


def text_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of a multimodal checkpoint's text model by itself."""
    outer = Fields(config)
    text = outer.text_config(("gemma3_text",), _USUAL | _TEXT)
    own = {"architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": outer.flag("tie_word_embeddings", True)}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    return {name: config[name] for name in kept if name in config} | text | own


def _text(fields: Fields, **names: Any) -> Decoder:
    _check(fields)
    first, third = fields.model_type == "gemma", fields.model_type == "gemma3_text"
    heads, kv_heads, head_dim = fields.heads()
    norm = Norm(fields.number("rms_norm_eps", 1e-6), plus_one=True)

    def layer(kind: str) -> Layer:
        attention = Grouped(
            heads,
            kv_heads,
            head_dim,
            Rope.from_hf(fields.config, kind if third else None, theta=1e6 if third and kind == FULL else 1e4),
            window=fields.size("sliding_window", 4096) if kind == SLIDING else None,
            scale=None if first else fields.number("query_pre_attn_scalar", 256) ** -0.5,
            softcap=None if first else fields.bound("attn_logit_softcapping"),
            qkv_bias=fields.flag("attention_bias"),
            o_bias=fields.flag("attention_bias"),
            qk_norm=norm if third else None,
        )
        return Layer(attention, Mlp(fields.size("intermediate_size"), "gelu_tanh"), **({} if first else _AROUND))

    kinds = {kind: layer(kind) for kind in (FULL, SLIDING)}
    return Decoder.from_fields(
        fields,
        [kinds[kind] for kind in _kinds(fields)],
        norm=norm,
        embed_scale=fields.size("hidden_size") ** 0.5,
        softcap=None if first else fields.bound("final_logit_softcapping"),
        **names,
    )


def _kinds(fields: Fields) -> tuple[str, ...]:
    """Return each layer's attention: Gemma 1 full, 2 alternating, 3 five sliding ones before each full one."""
    period = {"gemma": 1, "gemma2": 2, "gemma3_text": 6}[fields.model_type]
    period = fields.size("sliding_window_pattern", period)
    count = fields.size("num_hidden_layers")
    return fields.layer_types([FULL if (i + 1) % period == 0 else SLIDING for i in range(count)])


def _check(fields: Fields) -> None:
    # Gemma 1's files say gelu and mean its approximation by tanh.
    known = ("gelu", "gelu_pytorch_tanh")
    fields.choice("hidden_activation", known, fields.choice("hidden_act", known, "gelu_pytorch_tanh"))
    if fields.flag("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention=true is not supported; Luthier's models are causal.")

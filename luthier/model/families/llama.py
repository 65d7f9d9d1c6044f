"""Llama: Llama 2, 3, 3.1 to 3.3, SmolLM2, and whatever else calls itself ``llama``.

Left out on purpose: pretraining_tp, which no released checkpoint needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from luthier import mesh
from luthier.errors import UserError
from luthier.model.attention import attention
from luthier.model.cache import Fresh, LayerPast, Line, Past
from luthier.model.compute import Compute
from luthier.model.dense import dense
from luthier.model.layers import apply_rope, remat, rms_norm, rope_tables, silu_gate
from luthier.model.param import Param, Tree, stacked
from luthier.model.rope import Rope, inverse_frequencies
from luthier.model.segments import Segments

MODEL_TYPES = ("llama",)
LINE = "layers"
_ORIGINAL = "Take the model's original config.json."


@dataclass(frozen=True)
class Config:
    """The fields of ``config.json`` that matter, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``, with Transformers' defaults for what it leaves out.

        Raises UserError for a value that is of the wrong kind or not supported, KeyError for one that is missing.
        """
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UserError(f"config.json: hidden_act=`{activation}` is not supported for llama; silu is.")
        flags = {name: config.get(name) or False for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
        rope, epsilon = Rope.from_hf(config), config.get("rms_norm_eps", 1e-6)
        numbers = {"rms_norm_eps": epsilon} | {key: value for key, value in vars(rope).items() if key != "rope_type"}
        for name, value in flags.items():
            if type(value) is not bool:
                raise UserError(f"config.json: {name}={json.dumps(value)} is not true or false. {_ORIGINAL}")
        for name, value in numbers.items():
            if type(value) not in (int, float) or value <= 0:
                raise UserError(f"config.json: {name}={json.dumps(value)} is not a positive number. {_ORIGINAL}")
        return cls(**_sizes(config), rms_norm_eps=epsilon, rope=rope, **flags)


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of a ``config.json``, after checking that they are sizes and divide as attention needs."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: config[name] for name in names}
    given = {name: config.get(name) for name in ("num_key_value_heads", "head_dim")}
    sizes |= {name: value for name, value in given.items() if value is not None}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"config.json: {name}={json.dumps(value)} is not a positive integer. {_ORIGINAL}")

    def divide(name: str, by: str) -> int:
        if sizes[name] % sizes[by]:
            raise UserError(f"config.json: {name}={sizes[name]} is not a multiple of {by}={sizes[by]}. {_ORIGINAL}")
        return sizes[name] // sizes[by]

    sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    divide("num_attention_heads", "num_key_value_heads")
    if "head_dim" not in sizes:
        sizes["head_dim"] = divide("hidden_size", "num_attention_heads")
    if sizes["head_dim"] % 2:
        raise UserError(f"config.json: head_dim={sizes['head_dim']} is odd; rotary positions turn pairs. {_ORIGINAL}")
    return sizes


def spec(config: Config) -> Tree:
    """Declare every weight. o and down are stored output first, so that the narrow side is the one transposed."""
    sizes = {
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
    }

    def weight(tensor: str, layout: str, *axes: str, **kind: Any) -> Param:
        return Param(tensor, layout, axes, tuple(sizes[axis] for axis in axes), **kind)

    block = "model.layers.{layer}."
    attn, mlp = block + "self_attn.", block + "mlp."
    layer = {
        "attn_norm": weight(block + "input_layernorm.weight", "d -> d", "norm", init="ones"),
        "q": weight(attn + "q_proj.weight", "(n h) d -> d n h", "embed", "heads", "head_dim"),
        "k": weight(attn + "k_proj.weight", "(n h) d -> d n h", "embed", "kv_heads", "head_dim"),
        "v": weight(attn + "v_proj.weight", "(n h) d -> d n h", "embed", "kv_heads", "head_dim"),
        "o": weight(attn + "o_proj.weight", "d (n h) -> d n h", "embed", "heads", "head_dim"),
        "mlp_norm": weight(block + "post_attention_layernorm.weight", "d -> d", "norm", init="ones"),
        "gate": weight(mlp + "gate_proj.weight", "f d -> d f", "embed", "mlp"),
        "up": weight(mlp + "up_proj.weight", "f d -> d f", "embed", "mlp"),
        "down": weight(mlp + "down_proj.weight", "d f -> d f", "embed", "mlp"),
    }
    if config.attention_bias:
        layer |= {
            "q_bias": weight(attn + "q_proj.bias", "(n h) -> n h", "heads", "head_dim", init="zeros"),
            "k_bias": weight(attn + "k_proj.bias", "(n h) -> n h", "kv_heads", "head_dim", init="zeros"),
            "v_bias": weight(attn + "v_proj.bias", "(n h) -> n h", "kv_heads", "head_dim", init="zeros"),
            "o_bias": weight(attn + "o_proj.bias", "d -> d", "norm", init="zeros"),
        }
    if config.mlp_bias:
        layer |= {
            "gate_bias": weight(mlp + "gate_proj.bias", "f -> f", "mlp", init="zeros"),
            "up_bias": weight(mlp + "up_proj.bias", "f -> f", "mlp", init="zeros"),
            "down_bias": weight(mlp + "down_proj.bias", "d -> d", "norm", init="zeros"),
        }
    model = {
        "embed": weight("model.embed_tokens.weight", "v d -> v d", "vocab", "embed"),
        "layers": stacked(layer, "layer", range(config.num_hidden_layers)),
        "norm": weight("model.norm.weight", "d -> d", "norm", init="ones"),
    }
    if not config.tie_word_embeddings:
        model["head"] = weight("lm_head.weight", "v d -> v d", "vocab", "embed")
    return model


def cache_lines(config: Config) -> dict[str, Line]:
    """Declare what is kept of each token while sampling."""
    return {LINE: Line(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)}


def head(params: Tree) -> jax.Array:
    """Return the output embedding ``[V, D]``: the input's own where they are tied."""
    return params.get("head", params["embed"])


def forward(
    params: Tree,
    config: Config,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments: Segments,
    compute: Compute,
    past: Past | None = None,
) -> tuple[jax.Array, dict[str, Fresh]]:
    """Return the final hidden states ``[B, T, D]`` in ``compute.dtype``; log-probs are made from them by chunks.

    With a ``past``, the tokens go on from what is cached, and their own keys and values are returned beside it.
    """
    with jax.named_scope("embed"):
        x_BTD = params["embed"][tokens_BT].astype(compute.dtype)
        x_BTD = mesh.constrain(x_BTD, "batch", "time", "norm")
    rope = rope_tables(positions_BT, inverse_frequencies(config.rope, config.head_dim))

    def layer(x_BTD: jax.Array, scanned: tuple[Tree, jax.Array]) -> tuple[jax.Array, Fresh | None]:
        weights, index = scanned
        here = past.layer(LINE, index) if past is not None else None
        attended_BTD, fresh = _attend(weights, config, x_BTD, rope, segments, compute, here)
        x_BTD = x_BTD + attended_BTD
        x_BTD = x_BTD + _mlp(weights, config, x_BTD)
        return mesh.constrain(x_BTD, "batch", "time", "norm"), fresh if past is not None else None

    layers = (params["layers"], jnp.arange(config.num_hidden_layers))
    x_BTD, fresh = jax.lax.scan(remat(compute.remat)(layer), x_BTD, layers)
    return rms_norm(x_BTD, params["norm"], config.rms_norm_eps), {LINE: fresh} if past is not None else {}


def _attend(
    p: Tree,
    config: Config,
    x_BTD: jax.Array,
    rope: Any,
    segments: Segments,
    compute: Compute,
    past: LayerPast | None,
) -> tuple[jax.Array, Fresh]:
    with jax.named_scope("attention"):
        h_BTD = rms_norm(x_BTD, p["attn_norm"], config.rms_norm_eps)
        q_BTNH = _biased(dense("BTD,DNH->BTNH", h_BTD, p["q"]), p.get("q_bias"))
        k_BTKH = _biased(dense("BTD,DKH->BTKH", h_BTD, p["k"]), p.get("k_bias"))
        v_BTKH = _biased(dense("BTD,DKH->BTKH", h_BTD, p["v"]), p.get("v_bias"))
        q_BTNH, k_BTKH = apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope)
        o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segments, implementation=compute.attention, past=past)
        return _biased(dense("BTNH,DNH->BTD", o_BTNH, p["o"]), p.get("o_bias")), Fresh(k_BTKH, v_BTKH)


def _mlp(p: Tree, config: Config, x_BTD: jax.Array) -> jax.Array:
    with jax.named_scope("mlp"):
        h_BTD = rms_norm(x_BTD, p["mlp_norm"], config.rms_norm_eps)
        gate_BTF = _biased(dense("BTD,DF->BTF", h_BTD, p["gate"]), p.get("gate_bias"))
        up_BTF = _biased(dense("BTD,DF->BTF", h_BTD, p["up"]), p.get("up_bias"))
        return _biased(dense("BTF,DF->BTD", silu_gate(gate_BTF, up_BTF), p["down"]), p.get("down_bias"))


def _biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias.astype(x.dtype)

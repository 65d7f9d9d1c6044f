"""Where MaxText keeps each tensor of a Hugging Face model, family by family.

Facts from MaxText's public source, release 0.2.5. Paths and changes: ``checkpoint_conversion/utils/param_mapping.py``
(the functions ``LLAMA31_``, ``MIXTRAL_``, ``QWEN_``, ``GEMMA2_`` and ``GEMMA3_MAXTEXT_TO_HF_PARAM_MAPPING`` and
``..._HOOK_FN``); for Llama 2 and 3, Mistral and Gemma 1, ``standalone_scripts/llama_or_mistral_ckpt.py``
(``_convert_huggingface_to_jax_weights``) and ``convert_gemma_chkpt.py``. The layers' axis: ``param_scan_axis`` of
``configs/base.yml``. Sizes of vocabularies: ``configs/models``.

Three things are changed on the way. MaxText multiplies queries by 1/sqrt(head_dim) only in Qwen and Gemma 3; in the
others its query weights are so much smaller. Its Gemmas have embeddings times sqrt(hidden_size), and norms plus one.
Its rotation for Llama 3.1 turns neighbouring pairs, where Hugging Face's turns halves of a head.

Left out on purpose: MaxText's other families, biases that its decoders do not have, and towers for images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from luthier.checkpoint.maxtext_layout import Index, Leaf, Rule, leaf_shape, sizes_of
from luthier.errors import UserError
from luthier.model import param
from luthier.model.decoder import Decoder
from luthier.model.grouped import Grouped
from luthier.model.model import Model

_BLOCK = 6  # Gemma 3: layers that MaxText scans together, five local ones and a global one

# The vocabularies of MaxText's model files that are others than the checkpoint's on the hub.
_VOCABULARIES = {("gemma", 256_000): 256_128, ("gemma2", 256_000): 256_128, ("gemma3", 262_208): 262_144}

_MATRIX = "rows columns -> columns rows"
_SPLIT = "(heads dim) embed -> embed heads dim"
_TURNED = "(heads two half) embed -> embed heads (half two)"  # halves of a head become pairs
_JOINED = "embed (heads dim) -> heads dim embed"
_VECTOR = "size -> size"

_REMEDY = "Luthier knows MaxText's layout of Llama, Mistral and Mixtral, Qwen 2 and 3, and Gemma 1 to 3."


class _Place(NamedTuple):
    """Where a layer is: the ``path`` of its arrays, its number among those stacked there, a mark on their names."""

    path: str
    number: int | None
    mark: str = ""


@dataclass(frozen=True)
class _Family:
    """The rules of a layer's tensors by name, of the others, and where the layer of a number is."""

    layer: Mapping[str, Rule]
    outside: Mapping[str, Rule]
    place: Callable[[int, int, bool], _Place]


def describe(
    config: Mapping[str, Any], model: str, place: str, *, scanned: bool = True, axis: int = 1
) -> dict[str, Leaf]:
    """Return {path: leaf} of the tree that MaxText has of a model.

    ``config`` is its ``config.json`` and ``model`` its name. ``scanned``: layers are stacked, along ``axis``.

    Raises UserError, of ``place``, for a model that MaxText has no such tree of.
    """
    decoder = Model.from_hf(config, model).config
    kind, attention = config["model_type"], decoder.layers[0].attention
    if kind not in _FAMILIES or not isinstance(attention, Grouped):
        raise UserError(f"{place}: model_type {kind} cannot be in MaxText's layout here. {_REMEDY}")
    family = _FAMILIES[kind](decoder, attention.head_dim, turns_pairs(config, model), place)
    leaves: dict[str, Leaf] = {}
    for name, shape in param.tensor_shapes(decoder.spec).items():
        layer, plain, expert = _parsed(name, decoder)
        rule = (family.outside if layer is None else family.layer).get(plain)
        if rule is None:
            raise UserError(f"{place}: MaxText's {kind} has no place for {name}. {_REMEDY}")
        spot = _Place("", None) if layer is None else family.place(layer, decoder.num_hidden_layers, scanned)
        first, _, rest = rule.name.partition("/")
        path = "/".join(part for part in (spot.path, first + spot.mark, rest) if part)
        if path not in leaves:
            sizes = sizes_of(rule.layout, shape, {"dim": attention.head_dim, "two": 2, "half": attention.head_dim // 2})
            leaves[path] = Leaf(path, rule, sizes, (), axis)
        leaves[path].members[name] = Index(spot.number, expert)
    rows = vocabulary(kind, decoder.vocab_size)
    return {path: replace(leaf, shape=leaf_shape(leaf, rows)) for path, leaf in leaves.items()}


def vocabulary(kind: str, size: int) -> int:
    """Return how many tokens MaxText's model has of a ``model_type`` whose checkpoint on the hub has ``size``."""
    return _VOCABULARIES.get((kind.removesuffix("_text"), size), size)


def turns_pairs(config: Mapping[str, Any], model: str) -> bool:
    """Whether MaxText turns neighbouring pairs of a head: where it has Llama 3.1's rotation.

    Its ``llama3.3-70b`` has not (``init_rotary_embedding`` in ``layers/attentions.py`` asks for 3.1 by name).
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type"))
    names = f"{model} {config.get('_name_or_path', '')}".lower()
    return config["model_type"] == "llama" and kind == "llama3" and not re.search(r"llama-?3\.3", names)


def _parsed(name: str, decoder: Decoder) -> tuple[int | None, str, int | None]:
    """Return of a tensor's name the number of the layer, what is left with ``*`` for the expert's number, and that."""
    if name == f"{decoder.head}.weight":
        return None, "head", None
    rest = name.removeprefix(decoder.prefix)
    layer = None
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)", rest):
        layer, rest = int(found[1]), found[2]
    if found := re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)", rest):
        return layer, f"{found[1]}*{found[3]}", int(found[2])
    return layer, rest, None


def _llama(decoder: Decoder, head_dim: int, pairs: bool, place: str) -> _Family:
    norms = {
        "input_layernorm.weight": Rule("pre_self_attention_layer_norm/scale", _VECTOR),
        "post_attention_layernorm.weight": Rule("post_self_attention_layer_norm/scale", _VECTOR),
    }
    rules = _attention(head_dim**-0.5, pairs) | _MLP | norms
    return _Family(rules, _outside(), _one_by_one)


def _mixtral(decoder: Decoder, head_dim: int, pairs: bool, place: str) -> _Family:
    family = _llama(decoder, head_dim, pairs, place)
    experts = _experts("block_sparse_moe", "MoeBlock_0", ("w1", "w3", "w2"))
    return replace(family, layer=dict(family.layer) | experts)


def _qwen(decoder: Decoder, head_dim: int, pairs: bool, place: str) -> _Family:
    family = _llama(decoder, head_dim, pairs, place)
    biases = {
        f"self_attn.{ours}_proj.bias": Rule(f"self_attention/{theirs}/bias", "(heads dim) -> heads dim")
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    experts = _experts("mlp", "moe_block", ("gate_proj", "up_proj", "down_proj"))
    return replace(family, layer=dict(family.layer) | _attention(1.0, pairs) | _qk_norms(0.0) | biases | experts)


def _gemma(decoder: Decoder, head_dim: int, pairs: bool, place: str) -> _Family:
    norms = {
        "input_layernorm.weight": Rule("pre_self_attention_norm/scale", _VECTOR, plus=1.0),
        "post_attention_layernorm.weight": Rule("pre_ffw_norm/scale", _VECTOR, plus=1.0),
    }
    width = float(np.float32(decoder.hidden_size**0.5))
    return _Family(_attention(head_dim**-0.5, pairs) | _MLP | norms, _outside(width, 1.0), _one_by_one)


def _gemma2(decoder: Decoder, head_dim: int, pairs: bool, place: str) -> _Family:
    if decoder.num_hidden_layers % 2:
        raise UserError(
            f"{place}: MaxText's Gemma 2 has its layers in pairs, and num_hidden_layers={decoder.num_hidden_layers} "
            "is odd. Take the model's original config.json."
        )
    _check_windows(decoder, 2, place)
    family = _gemma(decoder, head_dim, pairs, place)
    return replace(family, layer=dict(family.layer) | _SANDWICH, place=_in_pairs)


def _gemma3(decoder: Decoder, head_dim: int, pairs: bool, place: str) -> _Family:
    _check_windows(decoder, _BLOCK, place)
    family = _gemma(decoder, head_dim, pairs, place)
    # MaxText's converter rounds this factor to bfloat16 for Gemma 3, and for Gemma 2 not.
    width = float(ml_dtypes.bfloat16(decoder.hidden_size**0.5))
    rules = dict(family.layer) | _SANDWICH | _attention(1.0, pairs) | _qk_norms(1.0)
    return _Family(rules, _outside(width, 1.0), _in_blocks)


_FAMILIES = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3,
}

_MLP = {
    "mlp.gate_proj.weight": Rule("mlp/wi_0/kernel", _MATRIX),
    "mlp.up_proj.weight": Rule("mlp/wi_1/kernel", _MATRIX),
    "mlp.down_proj.weight": Rule("mlp/wo/kernel", _MATRIX),
}
_SANDWICH = {  # Gemma 2 and 3: norms before and after
    "input_layernorm.weight": Rule("pre_self_attention_norm/scale", _VECTOR, plus=1.0),
    "post_attention_layernorm.weight": Rule("post_self_attention_norm/scale", _VECTOR, plus=1.0),
    "pre_feedforward_layernorm.weight": Rule("pre_ffw_norm/scale", _VECTOR, plus=1.0),
    "post_feedforward_layernorm.weight": Rule("post_ffw_norm/scale", _VECTOR, plus=1.0),
}


def _attention(scale: float, pairs: bool) -> dict[str, Rule]:
    turned = _TURNED if pairs else _SPLIT
    return {
        "self_attn.q_proj.weight": Rule("self_attention/query/kernel", turned, times=float(np.float32(scale))),
        "self_attn.k_proj.weight": Rule("self_attention/key/kernel", turned),
        "self_attn.v_proj.weight": Rule("self_attention/value/kernel", _SPLIT),
        "self_attn.o_proj.weight": Rule("self_attention/out/kernel", _JOINED),
    }


def _qk_norms(plus: float) -> dict[str, Rule]:
    return {
        "self_attn.q_norm.weight": Rule("self_attention/query_norm/scale", _VECTOR, plus=plus),
        "self_attn.k_norm.weight": Rule("self_attention/key_norm/scale", _VECTOR, plus=plus),
    }


def _experts(ours: str, theirs: str, names: tuple[str, str, str]) -> dict[str, Rule]:
    gate, up, down = (f"{ours}.experts.*.{name}.weight" for name in names)
    inputs = {gate: "wi_0", up: "wi_1", down: "wo"}
    rules = {name: Rule(f"{theirs}/{array}", _MATRIX) for name, array in inputs.items()}
    return rules | {f"{ours}.gate.weight": Rule(f"{theirs}/gate/kernel", _MATRIX)}


def _outside(width: float = 1.0, plus: float = 0.0) -> dict[str, Rule]:
    return {
        "embed_tokens.weight": Rule("token_embedder/embedding", "vocab embed -> vocab embed", times=width),
        "norm.weight": Rule("decoder/decoder_norm/scale", _VECTOR, plus=plus),
        "head": Rule("decoder/logits_dense/kernel", "vocab embed -> embed vocab"),
    }


def _one_by_one(layer: int, count: int, scanned: bool) -> _Place:
    return _Place("decoder/layers", layer) if scanned else _Place(f"decoder/layers_{layer}", None)


def _in_pairs(layer: int, count: int, scanned: bool) -> _Place:
    pair, mark = layer // 2, ("_local", "_global")[layer % 2]
    return _Place("decoder/layers", pair, mark) if scanned else _Place(f"decoder/layers_{pair}", None, mark)


def _in_blocks(layer: int, count: int, scanned: bool) -> _Place:
    whole = count - count % _BLOCK
    if not scanned:
        return _Place(f"decoder/layers_{layer}", None)
    if layer >= whole:
        return _Place(f"decoder/layers_remainder/layers_{layer - whole}", None)
    return _Place(f"decoder/layers/layers_{layer % _BLOCK}", layer // _BLOCK)


def _check_windows(decoder: Decoder, period: int, place: str) -> None:
    """MaxText's order of the layers is fixed: sliding ones, and at the end of each ``period`` a full one."""
    slides = [isinstance(layer.attention, Grouped) and layer.attention.window is not None for layer in decoder.layers]
    if slides != [(number + 1) % period != 0 for number in range(len(slides))]:
        raise UserError(
            f"{place}: MaxText computes this model with {period - 1} sliding layers before each full one, and its "
            "config.json has others. Take the model's original config.json, or another layout."
        )

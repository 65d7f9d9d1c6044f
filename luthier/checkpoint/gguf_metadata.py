"""What llama.cpp's metadata say of a decoder: ``gguf_models.config`` backwards.

Everything is taken from the description that a family made of ``config.json``, so that what that file leaves out is
stated too. Whether a file can say all of a model is found by reading it back (``check``). Left out on purpose: the
vocabulary (``gguf_vocabulary``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.checkpoint import gguf_file, gguf_models
from luthier.errors import UserError
from luthier.model.decoder import Decoder, Layer
from luthier.model.grouped import Grouped
from luthier.model.model import Model
from luthier.model.moe import Moe
from luthier.model.rope import Rope, inverse_frequencies

_LISTED = 5


def plain(decoder: Decoder) -> Decoder:
    """Return ``decoder`` with the names of a text model's tensors, whatever checkpoint it is a part of."""
    return replace(decoder, prefix="model.", head="lm_head", ignored=())


def describe(architecture: str, decoder: Decoder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {key: value} of the metadata of a file of ``architecture``, vocabulary and general facts left out.

    ``config`` is the ``config.json`` of the text model, for what no computation depends on.
    """
    whole, sliding = _kinds(decoder)
    attention, context_length = whole.attention, config["max_position_embeddings"]
    found: dict[str, Any] = {
        "context_length": context_length,
        "block_count": decoder.num_hidden_layers,
        "embedding_length": decoder.hidden_size,
        "vocab_size": decoder.vocab_size,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": float(decoder.norm.eps),
        "feed_forward_length": config.get("intermediate_size") or whole.mlp.size,
    }
    if isinstance(whole.mlp, Moe):
        found |= {"expert_count": whole.mlp.experts, "expert_used_count": whole.mlp.top_k}
        if architecture != "llama":
            found["expert_feed_forward_length"] = whole.mlp.size
    if attention.rope is not None:
        found |= _rope(attention.rope, attention.head_dim)
    if sliding is not None:
        found["attention.sliding_window"] = sliding.attention.window
        if sliding.attention.rope is not None and sliding.attention.rope != attention.rope:
            found["rope.freq_base_swa"] = float(sliding.attention.rope.rope_theta)
    if architecture == "phi3":
        found.setdefault("attention.sliding_window", 0)  # by which llama.cpp tells Phi-4 from the models before it
        found.setdefault("rope.scaling.original_context_length", context_length)
    caps = {"attn_logit_softcapping": attention.softcap, "final_logit_softcapping": decoder.softcap}
    found |= {key: float(cap) for key, cap in caps.items() if cap is not None}
    return {f"{architecture}.{key}": value for key, value in found.items()}


def settings(decoder: Decoder) -> dict[str, np.ndarray]:
    """Return {name: values} of the tensors that hold rotary factors, for the scalings that have one for each pair."""
    attention = _kinds(decoder)[0].attention
    rope, size = attention.rope, attention.head_dim
    if rope is None:
        return {}
    if rope.rope_type == "llama3":
        unscaled = Rope(rope.rope_theta, partial_rotary_factor=rope.partial_rotary_factor)
        return {gguf_models.ROPE_FACTORS: inverse_frequencies(unscaled, size) / inverse_frequencies(rope, size)}
    if rope.rope_type == "longrope":
        factors = {gguf_models.LONG_FACTORS: rope.long_factor, gguf_models.SHORT_FACTORS: rope.short_factor}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    return {}


def check(path: Path, decoder: Decoder, name: str) -> None:
    """Read back the head of the file at ``path``, and make sure that it describes ``decoder``.

    Raises UserError that says what of the model ``name`` a GGUF file has no place for.
    """
    header = gguf_file.read_header(path)
    found = Model.from_hf(gguf_models.config(header), name).config
    differences = list(_differences(plain(decoder), found, ""))
    if differences:
        listed = "\n  ".join(differences[:_LISTED])
        more = f"\n  and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
        raise UserError(
            f"{name}: a GGUF file of architecture `{header.architecture}` would be read as another model:\n  {listed}"
            f"{more}\nWrite a Hugging Face folder (output_format=huggingface), or change its config.json if the "
            "difference is nothing to you."
        )


def _kinds(decoder: Decoder) -> tuple[Any, Any | None]:
    """Return the first layer that sees everything, else the first, and the first that has a window, if any.

    Raises UserError for attention that is not of the grouped kind.
    """

    def first(windowed: bool) -> Layer | None:
        fitting = (layer for layer in decoder.layers if (layer.attention.window is not None) == windowed)
        return next(fitting, None)

    if not all(isinstance(layer.attention, Grouped) for layer in decoder.layers):
        raise UserError("Latent attention cannot be written as GGUF. Write a Hugging Face folder instead.")
    sliding = first(windowed=True)
    return first(windowed=False) or sliding, sliding


def _rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope.dimension_count": rope.rotary_dim(head_dim),
        "rope.freq_base": float(rope.rope_theta),
    }
    length = {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
    match rope.rope_type:
        case "linear" | "yarn":
            found |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
            found |= length if rope.rope_type == "yarn" else {}
        case "longrope":
            found |= length | {"rope.scaling.attn_factor": float(rope.table_factor)}
    return found


def _differences(wanted: Any, found: Any, place: str) -> Iterator[str]:
    """Yield where two descriptions differ; of several layers that differ alike the first."""
    if type(wanted) is type(found) and dataclasses.is_dataclass(wanted) and not isinstance(wanted, type):
        for field in dataclasses.fields(wanted):
            below = f"{place}.{field.name}".lstrip(".")
            yield from _differences(getattr(wanted, field.name), getattr(found, field.name), below)
    elif isinstance(wanted, tuple) and isinstance(found, tuple) and len(wanted) == len(found):
        said = set()
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            inner = list(_differences(one, other, ""))
            yield from (f"{place}[{number}].{text}".replace("].:", "]:") for text in inner if text not in said)
            said |= set(inner)
    elif wanted != found:
        yield f"{place}: {wanted}, in the file {found}"

"""The page of the families, made from the variants that the tests prove and from what the code reads in each.

``python tests/model/families_page.py > docs/families.md`` writes it; ``make families`` measures first. Left out on
purpose: what is measured elsewhere, such as speed and memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
FIGURES = Path(__file__).with_name("families.json")
PAGE = TESTS.parent / "docs" / "families.md"

HEAD = """# Model families

Each row is a variant that the tests prove equal to Transformers, on a tiny random model in fp32: log-probs over the
whole vocabulary within 1e-4 on rows with padding and packing, each tensor's gradient within 1e-3 of torch's, decoding
through the cache like one pass, loaded and saved tensors the same bit for bit, one device like eight. The last column
is the greatest difference of log-probs in the last run of the tests. A model of another `model_type` is refused.

| variant | `model_type` | as in | made of | greatest difference |
| --- | --- | --- | --- | --- |
"""

TAIL = """
Not supported, since they do not fit the frame of layers: Gemma 3n and 4 (an embedding for each layer, keys and values
that layers share), Mistral 4 and DeepSeek-V3.2 and later (other choices of experts or of tokens), OLMo 1 (norms without
weights), Phi-1 and Phi-2 (blocks side by side).
"""


def markdown(figures: dict[str, float]) -> str:
    """Return the page, with the difference that was measured of each variant."""
    from family_variants import VARIANTS

    from luthier.model.model import Model

    rows = []
    for name, variant in VARIANTS.items():
        made_of = ", ".join(features(Model.from_hf(variant.config, name).config))
        measured = f"{figures[name]:.0e}" if name in figures else "not measured"
        rows.append(f"| {name} | `{variant.config['model_type']}` | {variant.models} | {made_of} | {measured} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


def features(decoder: Any) -> list[str]:
    """Return what is particular about a decoder, in words."""
    layers = decoder.layers
    found = [*_attention(layers), *_ropes(layers), *_feed(layers)]
    if any(layer.after_attention for layer in layers):
        around = any(layer.before_attention for layer in layers)
        found.append("norms before and after blocks" if around else "norms after blocks")
    if decoder.norm.plus_one:
        found.append("norms stored less one")
    found += ["scaled embeddings"] * (decoder.embed_scale != 1.0)
    found += ["soft cap of logits"] * (decoder.softcap is not None)
    found += ["tied embeddings"] * decoder.tie_word_embeddings
    return found


def _attention(layers: Any) -> list[str]:
    first, windows = layers[0].attention, [getattr(layer.attention, "window", None) for layer in layers]
    if not hasattr(first, "kv_heads"):
        found = ["latent attention" + ("" if first.q_rank is None else ", of queries too")]
        return found + ["biases"] * first.bias
    found = ["a head of keys for each of queries" if first.heads == first.kv_heads else "grouped queries"]
    if any(windows):
        found.append("sliding window" + ("" if all(windows) else " in some layers"))
    biased = [name for name, given in (("q, k, v", first.qkv_bias), ("o", first.o_bias)) if given]
    found += [f"biases of {', '.join(biased)}"] if biased else []
    if first.qk_norm is not None:
        found.append("norm of all queries and keys" if first.whole_norm else "norm of each query and key")
    found += ["soft cap of scores"] * (first.softcap is not None)
    found += ["queries grow with position"] * (first.growth is not None)
    found += ["attention sinks"] * first.sinks
    found += ["q, k, v in one tensor"] * first.joined
    return found


def _ropes(layers: Any) -> list[str]:
    ropes = list(dict.fromkeys(layer.attention.rope for layer in layers if layer.attention.rope is not None))
    kinds = sorted({rope.rope_type for rope in ropes} - {"default"})
    found = [f"{kind} RoPE" for kind in kinds]
    found += ["RoPE of its own for local layers"] * (len(ropes) > 1)
    found += ["RoPE of a part of each head"] * any(rope.partial_rotary_factor < 1 for rope in ropes)
    found += ["no RoPE in some layers"] * any(layer.attention.rope is None for layer in layers)
    return found + ["RoPE of neighbouring pairs"] * any(rope.interleaved for rope in ropes)


def _feed(layers: Any) -> list[str]:
    experts = [layer.mlp for layer in layers if layer.mlp.top_k]
    plain = [layer.mlp for layer in layers if not layer.mlp.top_k]
    found = [] if not plain or plain[0].activation == "silu" else [plain[0].activation.replace("_", " ")]
    found += ["biases of the MLP"] * any(mlp.bias for mlp in plain)
    if experts:
        moe = experts[0]
        weights = "normed " * moe.normalised + moe.scoring.replace("_", " ")
        found.append(f"experts by {weights}" + (" in some layers" if plain else ""))
        found += ["groups of experts"] * (moe.groups > 1)
        found += ["a correction of the choice"] * moe.correction
        found += ["shared experts"] * (moe.shared is not None)
        found += ["clamped gates"] * (moe.clamp is not None)
    return found


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS / "model")]
    sys.stdout.write(markdown(json.loads(FIGURES.read_text())))

"""Models written as llama.cpp's converter writes them: names by the gguf package's own table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
from folders import spec_of
from gguf import GGMLQuantizationType as Kind

from luthier.model import param

# {architecture: the model_types written as it}
MODEL_TYPES = {
    "llama": ("llama", "mistral", "mixtral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen3moe": ("qwen3_moe",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3_text",),
    "phi3": ("phi3",),
}


def write_gguf(
    path: Path, config: dict[str, Any], kind: Kind = Kind.F32, factors: Any = None, metadata: Sequence[Any] = ()
) -> dict[str, np.ndarray]:
    """Write a model with random weights; return the values that a reader should find under Hugging Face's names."""
    architecture = next(name for name, types in MODEL_TYPES.items() if config["model_type"] in types)
    writer = library.GGUFWriter(path, architecture)
    for add, *values in [*_usual(config), *metadata]:
        getattr(writer, add)(*values)
    random, wanted, stacks = np.random.default_rng(0), {}, {}
    for name, shape in param.tensor_shapes(spec_of(config)).items():
        values = random.standard_normal(shape).astype(np.float32)
        stored = Kind.F32 if len(shape) == 1 else kind
        # Rows are quantised one by one, so the order of rows does not matter to their values.
        wanted[name] = _through(values, stored)
        if shift := architecture.startswith("gemma") and name.endswith("norm.weight"):
            wanted[name] = (values + np.float32(1)) - np.float32(1)
        stacked = re.sub(r"experts\.\d+\.", "experts.", name)
        stacks.setdefault((stacked, stacked != name, stored), []).append(
            _llama_cpp_rows(name, values, config) + np.float32(shift)
        )
    table = library.get_tensor_name_map(_arch(architecture), config["num_hidden_layers"])
    for (name, stacked, stored), tensors in stacks.items():
        values = np.stack(tensors) if stacked else tensors[0]
        writer.add_tensor(_name(table, name), library.quants.quantize(values, stored), raw_dtype=stored)
    if factors is not None:
        for name, values in factors.items():
            writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def _usual(config: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the converter writes of every model."""
    found = [
        ("add_block_count", config["num_hidden_layers"]),
        ("add_context_length", config["max_position_embeddings"]),
        ("add_embedding_length", config["hidden_size"]),
        ("add_head_count", config["num_attention_heads"]),
        ("add_head_count_kv", config["num_key_value_heads"]),
        ("add_layer_norm_rms_eps", config["rms_norm_eps"]),
        ("add_rope_freq_base", config["rope_theta"]),
    ]
    if "intermediate_size" in config:
        found.append(("add_feed_forward_length", config["intermediate_size"]))
    if "head_dim" in config and config["model_type"] in MODEL_TYPES["llama"]:
        found.append(("add_rope_dimension_count", config["head_dim"]))
    elif "head_dim" in config:
        found += [("add_key_length", config["head_dim"]), ("add_value_length", config["head_dim"])]
    return found


def _through(values: np.ndarray, kind: Kind) -> np.ndarray:
    return library.quants.dequantize(library.quants.quantize(values, kind), kind)


def _arch(architecture: str) -> Any:
    return next(arch for arch, name in library.MODEL_ARCH_NAMES.items() if name == architecture)


def _name(table: Any, name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    # Of Mixtral the converter takes the names that Mistral's own files had.
    stem = re.sub(r"model\.(layers\.\d+\.)block_sparse_moe\.experts\.", r"\1feed_forward.experts.", stem)
    return f"{table.get_name(stem)}.{suffix}"


def _llama_cpp_rows(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Interleave the two halves of each head, as llama.cpp's converter does for the architecture ``llama``."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None or config["model_type"] not in MODEL_TYPES["llama"]:
        return values
    split = values.reshape(config[heads], 2, -1, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)

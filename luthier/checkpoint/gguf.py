"""GGUF files read as Hugging Face checkpoints: the same config, tensor names, row order and float32 values.

Left out on purpose: writing them (``gguf_writing``), and the tokenizer (``gguf_tokenizer``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import einops
import numpy as np

from luthier.checkpoint import gguf_file, gguf_models
from luthier.checkpoint.gguf_file import Header
from luthier.checkpoint.gguf_models import Architecture
from luthier.checkpoint.tensors import Stored

Read = Callable[[], np.ndarray]


def read_config(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` that the metadata describes.

    Raises UserError for an architecture, a rotary scaling or a layout that is not supported.
    """
    return gguf_models.config(gguf_file.read_header(path))


def read_tensors(path: Path) -> dict[str, Stored]:
    """Return {Hugging Face name: tensor}, in Hugging Face's row order; the values are dequantised as they are read.

    Raises UserError for a type that cannot be dequantised, or a file that is not whole.
    """
    header = gguf_file.read_header(path)
    config, architecture = gguf_models.config(header), gguf_models.find(header)
    settings = (gguf_models.ROPE_FACTORS, gguf_models.LONG_FACTORS, gguf_models.SHORT_FACTORS)
    return {
        name: tensor
        for entry in header.entries
        if entry not in settings
        for name, tensor in _tensors(header, entry, architecture, config)
    }


def _tensors(
    header: Header, entry: str, architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[str, Stored]]:
    """Yield the Hugging Face tensors that lie in one of the file's."""
    name, shape = architecture.hf_name(entry), header.entries[entry].shape
    offset, kind = header.entries[entry].offset, header.kind(entry)
    if "{expert}" in name:
        shape = shape[1:]
        size = gguf_file.stored_bytes(shape, kind)
        for expert in range(header.entries[entry].shape[0]):
            read = partial(gguf_file.values, header.path, offset + expert * size, shape, kind)
            yield name.format(expert=expert), Stored(shape, np.dtype(np.float32), read)
        return
    read: Read = partial(gguf_file.values, header.path, offset, shape, kind)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(entry.split(".")[-2])
    if heads and architecture.interleaved:
        read = partial(_undo_interleave, read, config[heads])
    if architecture.plus_one and name.endswith("norm.weight"):
        read = partial(_less_one, read)
    yield name, Stored(shape, np.dtype(np.float32), read)


def _undo_interleave(read: Read, heads: int) -> np.ndarray:
    """llama.cpp pairs the dimensions that turn together, Hugging Face puts them half a head apart."""
    return einops.rearrange(read(), "(n half pair) ... -> (n pair half) ...", n=heads, pair=2)


def _less_one(read: Read) -> np.ndarray:
    return read() - 1

"""GGUF files read as Hugging Face checkpoints: the same config, tensor names, row order and float32 values.

The header is parsed here, because the gguf package's reader keeps an array for every vocabulary entry (seconds for a
model of 135M); dequantisation is that package's. Every tensor reads as float32, which holds each stored type exactly.
Left out on purpose: architectures other than "llama", split files, big-endian files, and the tokenizer
(``gguf_tokenizer``).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import einops
import numpy as np

from luthier.checkpoint.tensors import Stored, aligned
from luthier.errors import UserError

_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: ``shape`` row-major, ``kind`` the number of its ggml type, ``offset`` in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file and {name: entry} of its tensors, under llama.cpp's names."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the architecture's own value of ``key``, such as ``block_count``."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)


def read_header(path: Path) -> Header:
    """Parse the header. Raises UserError where the file is not a whole GGUF of version 2 or 3."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file. Download it again (a Git LFS pointer, perhaps).")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                return _parse(path, _Cursor(buffer, 4))
            except (struct.error, IndexError):
                raise UserError(f"{path}: the header is cut short. Download it again.") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` that the metadata describes.

    Raises UserError for an architecture, a rotary scaling or a layout that is not supported.
    """
    return config(read_header(path))


def config(header: Header) -> dict[str, Any]:
    """Return the ``config.json`` that ``header`` describes; see ``read_config``."""
    _check_supported(header)
    metadata, names = header.metadata, header.entries
    heads = header.get("attention.head_count")
    hidden = header.get("embedding_length")
    result = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": names["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": header.get("feed_forward_length"),
        "num_hidden_layers": header.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": header.get("attention.key_length") or header.get("rope.dimension_count") or hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": header.get("context_length"),
        "rms_norm_eps": _shortest(header.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(header.get("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(header),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "float32",
    }
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return result | {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in ids.items()}


def read_tensors(path: Path) -> dict[str, Stored]:
    """Return {Hugging Face name: tensor}, in Hugging Face's row order; the values are dequantised as they are read.

    Raises UserError for a type that cannot be dequantised, or a file that is not whole.
    """
    header = read_header(path)
    hf_config = config(header)
    names = {name: entry for name, entry in header.entries.items() if name != _ROPE_FACTORS}
    return {_hf_name(name): _stored(header, name, entry, hf_config) for name, entry in names.items()}


class _Cursor:
    """Reads GGUF's little-endian values one after the other."""

    _NUMBERS: Mapping[int, str] = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    _STRING, _ARRAY = 8, 9

    def __init__(self, buffer: mmap.mmap, offset: int) -> None:
        self.buffer, self.offset = buffer, offset

    def number(self, form: str) -> Any:
        value = struct.unpack_from("<" + form, self.buffer, self.offset)[0]
        self.offset += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.offset += length
        return self.buffer[self.offset - length : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == self._STRING:
            return self.string()
        if kind == self._ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in (self._STRING, self._ARRAY):
                return [self.value(inner) for _ in range(count)]
            form = f"<{count}{self._NUMBERS[inner]}"
            values = struct.unpack_from(form, self.buffer, self.offset)
            self.offset += struct.calcsize(form)
            return list(values)
        return self.number(self._NUMBERS[kind])


def _parse(path: Path, cursor: _Cursor) -> Header:
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not supported; 2 and 3 are.")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    found = {}
    for _ in range(tensors):
        name = cursor.string()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        found[name] = Entry(shape[::-1], cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(cursor.offset / alignment) * alignment
    entries = {name: Entry(entry.shape, entry.kind, start + entry.offset) for name, entry in found.items()}
    return Header(path, metadata, entries)


def _check_supported(header: Header) -> None:
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{header.path}: GGUF architecture `{architecture}` is not supported. Supported: llama.")
    if header.metadata.get("split.count", 1) > 1:
        raise UserError(f"{header.path}: one part of a split file. Merge it first: `llama-gguf-split --merge`.")
    if header.get("expert_count", 0):
        raise UserError(f"{header.path}: a mixture of experts, which is not supported for architecture `llama`.")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(header.get(key), list):
            raise UserError(f"{header.path}: llama.{key} differs between layers, which is not supported.")
    wanted = ("embedding_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon")
    missing = [f"llama.{key}" for key in wanted if header.get(key) is None]
    if "token_embd.weight" not in header.entries:
        missing.append("tensor token_embd.weight")
    if missing:
        raise UserError(f"{header.path}: incomplete GGUF file, without {', '.join(missing)}.")


def _rope_scaling(header: Header) -> dict[str, Any] | None:
    if _ROPE_FACTORS in header.entries:
        return _llama3_scaling(header)
    kind = header.get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest(header.get("rope.scaling.factor"))}
    if kind != "none":
        raise UserError(f"{header.path}: rope scaling `{kind}` is not supported. Supported: none, linear, llama3.")
    return None


def _llama3_scaling(header: Header) -> dict[str, Any] | None:
    """Recover Llama 3.1's settings from the factor that llama.cpp stores for each frequency.

    The largest factor is the setting; the band between is fixed by the published low and high factors over 8192
    positions, which all Llama 3 releases share. What those do not reproduce is refused.
    """
    from luthier.model.rope import Rope, inverse_frequencies

    entry = header.entries[_ROPE_FACTORS]
    given = _values(header.path, entry.offset, entry.shape, _kind(header, _ROPE_FACTORS, entry))
    if np.all(given == 1):
        return None
    theta = header.get("rope.freq_base", 10_000.0)
    settings = {
        "rope_type": "llama3",
        "factor": _shortest(float(given.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = inverse_frequencies(Rope.from_hf({"rope_theta": theta, "rope_scaling": settings}), 2 * len(given))
    if not np.allclose(inverse_frequencies(Rope(theta), 2 * len(given)) / scaled, given, rtol=1e-4):
        raise UserError(f"{header.path}: {_ROPE_FACTORS} is not Llama 3's rope scaling, which is not supported.")
    return settings


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _NAMES:
        return f"model.layers.{block[1]}.{_NAMES[block[2]]}.{suffix}"
    return f"{_NAMES.get(stem, stem)}.{suffix}"


def _kind(header: Header, name: str, entry: Entry) -> Any:
    from gguf import GGMLQuantizationType

    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    if known.get(entry.kind) not in _TYPES:
        kind = known.get(entry.kind, f"number {entry.kind}")
        raise UserError(
            f"{header.path}: tensor `{name}` has type {kind}, which cannot be read. Supported: {', '.join(_TYPES)}."
        )
    return GGMLQuantizationType(entry.kind)


def _stored(header: Header, name: str, entry: Entry, hf_config: Mapping[str, Any]) -> Stored:
    kind = _kind(header, name, entry)
    end = entry.offset + _stored_bytes(entry.shape, kind)
    if end > header.path.stat().st_size:
        raise UserError(f"{header.path}: cut short: tensor `{name}` ends at byte {end:,}. Download it again.")
    read: Callable[[], np.ndarray] = partial(_values, header.path, entry.offset, entry.shape, kind)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads:
        read = partial(_undo_interleave, read, hf_config[heads])
    return Stored(entry.shape, np.dtype(np.float32), read)


def _undo_interleave(read: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """llama.cpp pairs the dimensions that turn together, Hugging Face puts them half a head apart."""
    return einops.rearrange(read(), "(n half pair) ... -> (n pair half) ...", n=heads, pair=2)


def _stored_bytes(shape: tuple[int, ...], kind: Any) -> int:
    from gguf.quants import quant_shape_to_byte_shape

    return math.prod(quant_shape_to_byte_shape(shape, kind))


def _values(path: Path, offset: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Return the values as float32, dequantised by groups of rows so that no second whole copy arises."""
    from gguf.quants import dequantize

    raw = np.fromfile(path, np.uint8, count=_stored_bytes(shape, kind), offset=offset)
    if kind.name == "F32":
        return raw.view(np.float32).reshape(shape)
    rows = raw.reshape(math.prod(shape[:-1]), -1)
    values = aligned((len(rows), shape[-1]), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        group = slice(start, start + _ROWS_AT_ONCE)
        values[group] = dequantize(rows[group], kind)
    return values.reshape(shape)


def _shortest(value: float) -> float:
    """Return the decimal that a float32 was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))

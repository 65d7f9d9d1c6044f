"""A model written as a GGUF file, which llama.cpp and Transformers load.

Head and vocabulary are written by the gguf package; then weights one tensor, or one expert, at a time, in groups of
rows that are quantised by that package too. What was written so far is read back before the weights come, so that a
file that would be another model, or cut texts otherwise, is refused at once. Left out on purpose: the k-quants, which
that package only reads, and split files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import einops
import numpy as np

from luthier.checkpoint import disk, folder, gguf_file, gguf_metadata, gguf_models, gguf_vocabulary
from luthier.checkpoint.gguf_models import Architecture
from luthier.checkpoint.source import Source
from luthier.checkpoint.tensors import Stored
from luthier.errors import UserError
from luthier.model import param
from luthier.model.decoder import Decoder

Kind = Literal["f32", "f16", "bf16", "q8_0"]
KINDS: tuple[Kind, ...] = ("f32", "f16", "bf16", "q8_0")
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers for what most of a file is
_ROWS_AT_ONCE = 4096
_ALIGNMENT = 32


@dataclass(frozen=True)
class _Tensor:
    """One of the file's tensors: its ``kind`` is a GGMLQuantizationType, ``pieces`` are stacked where experts are."""

    shape: tuple[int, ...]
    kind: Any
    pieces: tuple[Stored, ...]
    arrange: Callable[[np.ndarray], np.ndarray]

    @property
    def nbytes(self) -> int:
        return gguf_file.stored_bytes(self.shape, self.kind)


def write(
    path: Path, source: Source, tensors: Mapping[str, Stored], decoder: Decoder, tokenizer: Any, kind: Kind
) -> None:
    """Write ``tensors``, under the names of ``source``'s checkpoint, as a GGUF file whose matrices are of ``kind``.

    Norms, biases and routers are kept in fp32; rows that do not divide into blocks of ``q8_0`` in fp16. The file takes
    its place when it is whole. Raises UserError for a model or tokenizer that a GGUF file cannot hold, RunError where
    the disk refuses it.
    """
    name, architecture = gguf_models.of_model_type(source.text["model_type"], source.name)
    if source.context_length is None:
        raise UserError(f"{source.name}: config.json lacks max_position_embeddings, which a GGUF file states. Add it.")
    fields = _general(source, kind)
    fields |= gguf_metadata.describe(name, decoder, source.text)
    fields |= gguf_vocabulary.metadata(tokenizer, decoder.vocab_size, source.name)
    settings = {key: _setting(values) for key, values in gguf_metadata.settings(decoder).items()}
    weights = _weights(tensors, architecture, decoder, kind, source.name)
    new = path.with_name(f".{path.name}.partial")
    size = sum(tensor.nbytes for tensor in weights.values())
    with disk.writing(path, "the model", lambda: f"Have {size / 1e9:.2f} GB free and the folder writable."):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_head(new, name, fields, settings | weights)
            with new.open("ab") as file:
                for key, tensor in settings.items():
                    _write_tensor(file, key, tensor, source.name)
                file.flush()
                gguf_metadata.check(new, decoder, source.name)
                gguf_vocabulary.check(new, tokenizer, source.name)
                for key, tensor in weights.items():
                    _write_tensor(file, key, tensor, source.name)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            folder.sync(path.parent)
        finally:
            new.unlink(missing_ok=True)


def _general(source: Source, kind: Kind) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.name": Path(source.name).name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }


def _weights(
    tensors: Mapping[str, Stored], architecture: Architecture, decoder: Decoder, kind: Kind, place: str
) -> dict[str, _Tensor]:
    """Return {llama.cpp's name: tensor}, in the order of layers."""
    stacks: dict[str, list[Stored]] = {}
    for name in param.tensor_shapes(gguf_metadata.plain(decoder).spec):
        own = name.removeprefix("model.")
        stored = decoder.prefix + own if own != name else decoder.head + name.removeprefix("lm_head")
        try:
            stacks.setdefault(architecture.gguf_name(name), []).append(tensors[stored])
        except KeyError:
            raise UserError(
                f"{place}: a GGUF file of its kind has no place for the tensor {stored}. Write a Hugging Face folder "
                "(output_format=huggingface)."
            ) from None
    found = {}
    for name in sorted(stacks, key=_layer):
        pieces = tuple(stacks[name])
        stacked = "{expert}" in architecture.hf_name(name)
        shape = (len(pieces), *pieces[0].shape) if stacked else pieces[0].shape
        found[name] = _Tensor(shape, _stored_kind(name, shape, kind), pieces, _arrangement(name, architecture, decoder))
    return found


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _stored_kind(name: str, shape: tuple[int, ...], kind: Kind) -> Any:
    """Return the GGMLQuantizationType of a tensor in a file of ``kind``."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or name.endswith("_norm.weight") or ".ffn_gate_inp." in name:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    block, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % block else wanted


def _arrangement(name: str, architecture: Architecture, decoder: Decoder) -> Callable[[np.ndarray], np.ndarray]:
    """Return what llama.cpp's converter does to the values of a tensor: ``gguf`` undoes it."""
    attention: Any = decoder.layers[0].attention
    heads = {"attn_q": attention.heads, "attn_k": attention.kv_heads}.get(name.split(".")[-2])
    if heads and architecture.interleaved:
        return partial(einops.rearrange, pattern="(n pair half) ... -> (n half pair) ...", n=heads, pair=2)
    if architecture.plus_one and name.endswith("norm.weight"):
        return lambda values: values.astype(np.float32) + np.float32(1)
    return lambda values: values


def _setting(values: np.ndarray) -> _Tensor:
    from gguf import GGMLQuantizationType

    stored = Stored(values.shape, values.dtype, lambda: values)
    return _Tensor(values.shape, GGMLQuantizationType.F32, (stored,), lambda values: values)


def _write_head(path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, _Tensor]) -> None:
    """Write metadata, and the name, shape and place of each tensor; the file ends where the first of them begins."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    adds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in fields.items():
        adds.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as file:
        _pad(file)


def _write_tensor(file: BinaryIO, name: str, tensor: _Tensor, place: str) -> None:
    from gguf import quants

    for piece in tensor.pieces:
        values = tensor.arrange(piece.read())
        rows = values.reshape(-1, values.shape[-1])
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            group = rows[start : start + _ROWS_AT_ONCE].astype(np.float32)
            with np.errstate(over="ignore"):
                stored = quants.quantize(group, tensor.kind)
            if tensor.kind.name == "F16" and np.isinf(stored).any() and np.isfinite(group).all():
                raise UserError(f"{place}: {name} has values beyond fp16's 65504. Set gguf_type=bf16 or gguf_type=f32.")
            file.write(np.ascontiguousarray(stored).view(np.uint8).data)
    _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))

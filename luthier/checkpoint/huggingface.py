"""Weights between a checkpoint's tensors and our sharded, stacked arrays, and the folder that a run leaves.

Tensors pass one at a time in both directions: loading holds the model and two tensors, saving the same; and loading,
each process reads of floats in safetensors only the bytes that its own devices hold. Types are converted on the host,
where subnormal numbers survive. Left out on purpose: optimizer state (``state``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from luthier import processes
from luthier.checkpoint import disk, placing, quantised
from luthier.checkpoint import folder as whole
from luthier.checkpoint import tensors as files
from luthier.checkpoint import tokenizer as tokenizer_files
from luthier.checkpoint.source import Source
from luthier.checkpoint.tensors import Stored
from luthier.errors import UserError
from luthier.model import param as param_lib
from luthier.model import quant
from luthier.model.param import Param, Tree

SHARD_LIMIT = 5 * 10**9
_FLOATS = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16")}
_LISTED = 20


def check(source: Source, spec: Tree, ignored: Sequence[str] = ()) -> None:
    """Compare the checkpoint's headers with ``spec``, before any value is read.

    Tensors whose whole name matches one of the regular expressions ``ignored`` may be there besides. Raises one
    UserError that lists every missing, unexpected and misshapen tensor, and every type that is not a float.
    """
    wanted, found = param_lib.tensor_shapes(spec), source.tensors
    faults = [f"missing: {name} {_shape(shape)}" for name, shape in wanted.items() if name not in found]
    faults += [
        f"unexpected: {name} {_shape(found[name].shape)}"
        for name in _others(source, wanted)
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    for name in wanted.keys() & found.keys():
        tensor = found[name]
        if tensor.shape != tuple(wanted[name]):
            faults.append(f"misshapen: {name} is {_shape(tensor.shape)}, config.json asks for {_shape(wanted[name])}")
        elif tensor.dtype not in _FLOATS.values():
            faults.append(f"not a float of 16 or 32 bits: {name} is {tensor.dtype}")
    if faults:
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise UserError(
            f"{source.path}: {len(faults)} tensors do not fit its config.json:\n  "
            + "\n  ".join(sorted(faults)[:_LISTED])
            + more
            + "\nIs it the checkpoint of another model, or are shards missing?"
        )


def left_out(source: Source, spec: Tree, ignored: Sequence[str]) -> str:
    """Return what of the checkpoint the model leaves out, counted by the patterns of ``ignored``; empty if nothing."""
    others = _others(source, param_lib.tensor_shapes(spec))
    counts = {pattern: sum(re.fullmatch(pattern, name) is not None for name in others) for pattern in ignored}
    return ", ".join(f"{count:,} tensor{'s' * (count > 1)} {pattern}" for pattern, count in counts.items() if count)


def load(
    source: Source, spec: Tree, dtype: Any, mesh: Mesh, ignored: Sequence[str] = (), quantization: str = ""
) -> Tree:
    """Return the weights as ``dtype``, stacked as ``spec`` says and sharded over ``mesh``; every process calls it.

    ``quantization`` is one of ``quant.KINDS`` or "": each tensor is quantised on the host before the next is read.
    ``dtype`` is then the type of what stays a float, and may be a function that returns it for a ``Param``.

    Raises UserError as ``check`` does. A ``random`` source has no tensors: ``param.initialise`` makes its weights, and
    ``placing.quantise`` quantises them.
    """
    check(source, spec, ignored)
    structure = placing.structure(spec)
    weights = structure.flatten_up_to(placing.empty(spec, quantization, dtype, mesh))
    for name, places in _places(spec).items():
        _fill(weights, places, source.tensors[name])
    return jax.tree.unflatten(structure, weights)


def save(
    folder: Path,
    params: Tree,
    spec: Tree,
    source: Source,
    tokenizer: Any,
    *,
    dtype: str = "auto",
    chat_template: str = "",
    card: str = "",
    shard_limit: int = SHARD_LIMIT,
) -> None:
    """Write ``folder`` as Transformers reads it, and put it in its place only when it is whole; every process calls it.

    ``dtype`` is the type of the weights, ``auto`` the type that each tensor was loaded in. Tensors of ``source`` that
    are not the model's own go along as they are, so that what was whole stays whole. ``chat_template`` replaces
    the tokenizer's own, ``card`` is the text of README.md. Failures are as in ``write``.
    """
    ours = _saved(params, spec, source, dtype)
    tensors = ours | {name: source.tensors[name] for name in _others(source, ours)}
    if processes.is_first():
        write(
            folder,
            tensors,
            source,
            partial(tokenizer_files.save, tokenizer, chat_template=chat_template),
            dtype=_only_type(ours),
            card=card,
            shard_limit=shard_limit,
            aside="No checkpoint was touched: it goes on from the last one.",
        )
    else:
        for tensor in ours.values():
            tensor.read()  # gathering takes every process
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def write(
    folder: Path,
    tensors: Mapping[str, Stored],
    source: Source,
    write_tokenizer: Callable[[Path], None],
    *,
    dtype: str | None = None,
    card: str = "",
    shard_limit: int = SHARD_LIMIT,
    aside: str = "",
) -> None:
    """Write ``folder`` as Transformers reads it, one tensor at a time, and put it in its place when it is whole.

    ``dtype`` is what ``config.json`` says of the weights' type, by default the one that all ``tensors`` have, if they
    do. A failure leaves the folder that was there before (``folder.write``); where the disk refuses it is a RunError,
    which ends with ``aside``.
    """
    shards = files.shard(tensors, shard_limit)
    documents: dict[str, Any] = {
        "config.json": _saved_config(source, dtype or _only_type(tensors)),
        "generation_config.json": _generation_config(source),
        "README.md": card,
    }
    if len(shards) > 1:
        documents[files.INDEX] = files.index(shards)
    with disk.writing(folder, "the model", partial(_what_stands, folder, shards, aside)):
        whole.write(folder, shards, documents, write_tokenizer)


def outgoing(params: Tree, spec: Tree, dtype: np.dtype) -> dict[str, Stored]:
    """Return {Hugging Face name: tensor} of our weights as ``dtype``, each gathered when it is read.

    What is exact comes in fp32, what is quantised as the floats that it stands for. All processes read the same ones in
    the same order.
    """
    arrays = placing.structure(spec).flatten_up_to(params)
    return {
        name: _gathered(arrays, places, np.dtype(places[0].param.dtype(dtype)))
        for name, places in _places(spec).items()
    }


class _Place(NamedTuple):
    """A weight's part in one tensor: the ``number`` of its array among the leaves, and the slice of it there."""

    number: int
    param: Param
    index: tuple[int, ...]


def _places(spec: Tree) -> dict[str, list[_Place]]:
    """Return {Hugging Face name: whatever lies in that tensor}."""
    found: dict[str, list[_Place]] = {}
    for number, param in enumerate(param_lib.leaves(spec).values()):
        for name, index in param.tensors().items():
            found.setdefault(name, []).append(_Place(number, param, index))
    return found


def _others(source: Source, ours: Mapping[str, Any]) -> list[str]:
    """Return the names of the checkpoint's tensors that are none of ``ours`` and worth keeping."""
    return [name for name in source.tensors if name not in ours and not _harmless(name)]


def _fill(weights: list[Any], places: list[_Place], stored: Stored) -> None:
    """A function of its own, so that one tensor is let go before the next is read."""
    if stored.cut is not None and all(_is_block(weights[place.number], place.param) for place in places):
        for number, param, index in places:
            weights[number] = placing.fill(weights[number], param, index, stored)
        return
    tensor = stored.read()
    for number, param, index in places:
        weights[number] = placing.put(weights[number], param, index, param.from_tensor(tensor))


def _is_block(weight: Any, param: Param) -> bool:
    """Whether a weight is read in blocks: not where whole matrices are quantised, or others' rows lie in between."""
    return not quant.kind(weight) and (param.part is None or param.part.step == 1)


def _saved(params: Tree, spec: Tree, source: Source, dtype: str) -> dict[str, Stored]:
    """Return {Hugging Face name: tensor} of our arrays in the types that they are saved in."""
    arrays = placing.structure(spec).flatten_up_to(params)
    if any(quant.kind(array) for array in arrays):
        raise ValueError("save: the weights are quantised; only an adapter over them can be saved")
    found: dict[str, Stored] = {}
    for name, places in _places(spec).items():
        kind = _FLOATS[dtype] if dtype != "auto" else _loaded_type(source, name, arrays[places[0].number])
        found[name] = _gathered(arrays, places, kind)
    return found


def _gathered(arrays: list[Any], places: list[_Place], dtype: np.dtype) -> Stored:
    shape = places[0].param.tensor_shape
    return Stored(shape, dtype, partial(_gather, arrays, places, shape, dtype))


def _loaded_type(source: Source, name: str, array: jax.Array) -> np.dtype:
    return source.tensors[name].dtype if name in source.tensors else np.dtype(array.dtype)


def _gather(arrays: list[Any], places: list[_Place], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    tensor = np.zeros(shape, dtype)
    for number, param, index in places:
        piece = placing.take(arrays[number], index)
        param.into_tensor(piece.astype(dtype, copy=False), tensor)
    return tensor


def _what_stands(folder: Path, shards: whole.Shards, aside: str) -> str:
    size = sum(tensor.nbytes for group in shards.values() for tensor in group.values())
    there = "The model that was there before stands" if folder.exists() else "No model is there"
    return (
        f"{there}. Have {size / 1e9:.2f} GB free and the folder writable, and run the same command again. {aside}"
    ).rstrip()


def _only_type(tensors: Mapping[str, Stored]) -> str | None:
    kinds = {str(tensor.dtype) for tensor in tensors.values()}
    return kinds.pop() if len(kinds) == 1 else None


def _saved_config(source: Source, kind: str | None) -> dict[str, Any]:
    """Return the original config with the type of what was written; Transformers 4 called that field torch_dtype."""
    config = quantised.without(source.config)
    if not config.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    if kind is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = kind
        text = config.get("text_config") or {}
        if changed := {name: kind for name in ("torch_dtype", "dtype") if name in text}:
            config["text_config"] = text | changed
    return config


def _generation_config(source: Source) -> dict[str, Any]:
    if source.generation_config is not None:
        return source.generation_config
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: source.text[name] for name in ids if source.text.get(name) is not None}


def _harmless(name: str) -> bool:
    """Buffers that old checkpoints stored, and the head of a tied model, which is the embedding again."""
    return name.endswith(("rotary_emb.inv_freq", "lm_head.weight"))


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "scalar"

"""Weights between a checkpoint's tensors and our sharded, stacked arrays, and the folder that a run leaves.

Tensors pass one at a time in both directions: loading holds the model and two tensors, saving the same. A tensor
that holds several weights is read and written once. Types are converted on the host, where subnormal numbers survive.
Left out on purpose: optimizer state (``state``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from luthier import mesh as mesh_lib
from luthier.checkpoint import disk, quantised
from luthier.checkpoint import tensors as files
from luthier.checkpoint import tokenizer as tokenizer_files
from luthier.checkpoint.source import Source
from luthier.checkpoint.tensors import Stored
from luthier.errors import UserError
from luthier.model import param as param_lib
from luthier.model.param import Param, Tree

SHARD_LIMIT = 5 * 10**9
_FLOATS = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16")}
_LISTED = 20

Shards = Mapping[str, Mapping[str, Stored]]


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


def load(source: Source, spec: Tree, dtype: Any, mesh: Mesh, ignored: Sequence[str] = ()) -> Tree:
    """Return the weights as ``dtype``, stacked as ``spec`` says and sharded over ``mesh``; every process calls it.

    Raises UserError as ``check`` does. A ``random`` source has no tensors: ``param.initialise`` makes its weights.
    """
    check(source, spec, ignored)
    empty = jax.jit(
        lambda: param_lib.map_spec(lambda param: jnp.zeros(param.shape, param.dtype(dtype)), spec),
        out_shardings=param_lib.shardings(spec, mesh),
    )
    arrays, structure = jax.tree.flatten(empty())
    for name, places in _places(spec).items():
        _fill(arrays, places, source.tensors[name], mesh)
    return jax.tree.unflatten(structure, arrays)


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
    the tokenizer's own, ``card`` is the text of README.md. A failure leaves the folder that was there before; where the
    disk refuses it is a RunError. The one gap is between two renames: a machine that dies just there leaves the old
    model as ``.NAME.old``.
    """
    ours = _outgoing(params, spec, source, dtype)
    shards = files.shard(ours | {name: source.tensors[name] for name in _others(source, ours)}, shard_limit)
    documents: dict[str, Any] = {
        "config.json": _saved_config(source, ours),
        "generation_config.json": _generation_config(source),
        "README.md": card,
    }
    if len(shards) > 1:
        documents[files.INDEX] = files.index(shards)
    if jax.process_index() == 0:
        with disk.writing(folder, "the model", partial(_what_stands, folder, shards)):
            _write(folder, shards, documents, partial(tokenizer_files.save, tokenizer, chat_template=chat_template))
    else:
        for name in (name for group in shards.values() for name in group if name in ours):
            ours[name].read()  # gathering takes every process
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


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


def _fill(arrays: list[jax.Array], places: list[_Place], stored: Stored, mesh: Mesh) -> None:
    """A function of its own, so that one tensor is let go before the next is read."""
    tensor = stored.read()
    for number, param, index in places:
        sharding = mesh_lib.sharding(param.slice_axes, param.slice_shape, mesh)
        piece = _place(param.from_tensor(tensor), arrays[number].dtype, sharding)
        arrays[number] = _put(arrays[number], piece, index, arrays[number].sharding)
        arrays[number].block_until_ready()


def _place(piece: np.ndarray, dtype: Any, sharding: NamedSharding) -> jax.Array:
    """Each device takes its own part of the host's ``piece``, in the memory order and type that it will have there."""

    def part(where: Any) -> np.ndarray:
        values = piece[where]
        if values.dtype == dtype and values.flags.c_contiguous:
            return values
        copy = files.aligned(values.shape, dtype)
        np.copyto(copy, values, casting="unsafe")
        return copy

    return jax.make_array_from_callback(piece.shape, sharding, part)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(array: jax.Array, piece: jax.Array, index: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Write one slice in place. Arrays made so may be donated later, which the host's own memory may not."""
    start = (*index, *[0] * piece.ndim)
    array = jax.lax.dynamic_update_slice(array, jnp.expand_dims(piece, tuple(range(len(index)))), start)
    return jax.lax.with_sharding_constraint(array, sharding)


@partial(jax.jit, static_argnums=2)
def _take(array: jax.Array, index: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Return one slice, whole on every device."""
    for place in index:
        array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
    return jax.lax.with_sharding_constraint(array, sharding)


def _outgoing(params: Tree, spec: Tree, source: Source, dtype: str) -> dict[str, Stored]:
    """Return {Hugging Face name: tensor} of our arrays, each gathered when it is read."""
    arrays = jax.tree.structure(param_lib.map_spec(lambda _: 0, spec)).flatten_up_to(params)
    found: dict[str, Stored] = {}
    for name, places in _places(spec).items():
        first = places[0]
        kind = _FLOATS[dtype] if dtype != "auto" else _loaded_type(source, name, arrays[first.number])
        shape = first.param.tensor_shape
        found[name] = Stored(shape, kind, partial(_gather, arrays, places, shape, kind))
    return found


def _loaded_type(source: Source, name: str, array: jax.Array) -> np.dtype:
    return source.tensors[name].dtype if name in source.tensors else np.dtype(array.dtype)


def _gather(arrays: list[jax.Array], places: list[_Place], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    tensor = np.zeros(shape, dtype)
    for number, param, index in places:
        array = arrays[number]
        if index or not array.is_fully_replicated:  # else it is here as it is, and needs no copy
            array = _take(array, index, NamedSharding(cast(NamedSharding, array.sharding).mesh, PartitionSpec()))
        piece = np.asarray(array.addressable_data(0))
        param.into_tensor(piece.astype(dtype, copy=False), tensor)
    return tensor


def _write(folder: Path, shards: Shards, documents: dict[str, Any], write_tokenizer: Callable[[Path], None]) -> None:
    new = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for name, group in shards.items():
            files.write_safetensors(new / name, group)
        for name, content in documents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (new / name).write_text(text, encoding="utf-8")
        write_tokenizer(new)
        for path in [*new.iterdir(), new]:
            _sync(path)
        _replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _what_stands(folder: Path, shards: Shards) -> str:
    size = sum(tensor.nbytes for group in shards.values() for tensor in group.values())
    there = "The model that was there before stands" if folder.exists() else "No model is there"
    return (
        f"{there}, and no checkpoint was touched. Have {size / 1e9:.2f} GB free and the folder writable, and run the "
        "same command again: it goes on from the last checkpoint."
    )


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _saved_config(source: Source, ours: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the original config with the type of what was written; Transformers 4 called that field torch_dtype."""
    config = quantised.without(source.config)
    if not config.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    kinds = {str(tensor.dtype) for tensor in ours.values()}
    if len(kinds) == 1:
        kind = kinds.pop()
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

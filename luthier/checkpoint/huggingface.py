"""Weights between a checkpoint's tensors and our sharded, stacked arrays, and the folder that a run leaves.

Tensors pass one at a time in both directions: loading holds the model and two tensors, saving the same. Types are
converted on the host, where subnormal numbers survive. Left out on purpose: optimizer state (``state``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from luthier import mesh as mesh_lib
from luthier.checkpoint import disk
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


def check(source: Source, spec: Tree) -> None:
    """Compare the checkpoint's headers with ``spec``, before any value is read.

    Raises one UserError that lists every missing, unexpected and misshapen tensor, and every type that is not a float.
    """
    wanted, found = param_lib.tensor_shapes(spec), source.tensors
    faults = [f"missing: {name} {_shape(shape)}" for name, shape in wanted.items() if name not in found]
    faults += [
        f"unexpected: {name} {_shape(tensor.shape)}"
        for name, tensor in found.items()
        if name not in wanted and not _harmless(name)
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


def load(source: Source, spec: Tree, dtype: Any, mesh: Mesh) -> Tree:
    """Return the weights as ``dtype``, stacked as ``spec`` says and sharded over ``mesh``; every process calls it.

    Raises UserError as ``check`` does. A ``random`` source has no tensors: ``param.initialise`` makes its weights.
    """
    check(source, spec)
    empty = jax.jit(
        lambda: param_lib.map_spec(lambda param: jnp.zeros(param.shape, dtype), spec),
        out_shardings=param_lib.shardings(spec, mesh),
    )()
    return param_lib.map_spec(partial(_fill, source, mesh), spec, empty)


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

    ``dtype`` is the type of the weights, ``auto`` the type that each tensor was loaded in. ``chat_template`` replaces
    the tokenizer's own, ``card`` is the text of README.md. A failure leaves the folder that was there before; where the
    disk refuses it is a RunError. The one gap is between two renames: a machine that dies just there leaves the old
    model as ``.NAME.old``.
    """
    shards = files.shard(_outgoing(params, spec, source, dtype), shard_limit)
    documents: dict[str, Any] = {
        "config.json": _saved_config(source, shards),
        "generation_config.json": _generation_config(source),
        "README.md": card,
    }
    if len(shards) > 1:
        documents[files.INDEX] = files.index(shards)
    if jax.process_index() == 0:
        with disk.writing(folder, "the model", partial(_what_stands, folder, shards)):
            _write(folder, shards, documents, partial(tokenizer_files.save, tokenizer, chat_template=chat_template))
    else:
        for tensor in (tensor for group in shards.values() for tensor in group.values()):
            tensor.read()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _fill(source: Source, mesh: Mesh, param: Param, array: jax.Array) -> jax.Array:
    sharding = mesh_lib.sharding(param.slice_axes, param.slice_shape, mesh)
    for name, index in param.tensors().items():
        piece = param.from_tensor(source.tensors[name].read())
        array = _put(array, _place(piece, array.dtype, sharding), index, array.sharding)
        array.block_until_ready()
    return array


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
    found: dict[str, Stored] = {}

    def add(param: Param, array: jax.Array) -> None:
        for name, index in param.tensors().items():
            kind = _FLOATS[dtype] if dtype != "auto" else _loaded_type(source, name, array)
            found[name] = Stored(param.tensor_shape, kind, partial(_gather, param, array, index, kind))

    param_lib.map_spec(add, spec, params)
    return found


def _loaded_type(source: Source, name: str, array: jax.Array) -> np.dtype:
    return source.tensors[name].dtype if name in source.tensors else np.dtype(array.dtype)


def _gather(param: Param, array: jax.Array, index: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    everywhere = NamedSharding(cast(NamedSharding, array.sharding).mesh, PartitionSpec())
    piece = _take(array, index, everywhere)
    return param.to_tensor(np.asarray(piece.addressable_data(0))).astype(dtype, order="C", copy=False)


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


def _saved_config(source: Source, shards: Shards) -> dict[str, Any]:
    """Return the original config with the type of what was written; Transformers 4 called that field torch_dtype."""
    config = dict(source.config)
    if not config.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    kinds = {str(tensor.dtype) for group in shards.values() for tensor in group.values()}
    if len(kinds) == 1:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = kinds.pop()
    return config


def _generation_config(source: Source) -> dict[str, Any]:
    if source.generation_config is not None:
        return source.generation_config
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: source.config[name] for name in ids if source.config.get(name) is not None}


def _harmless(name: str) -> bool:
    """Buffers that old checkpoints stored, and the head of a tied model, which is the embedding again."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

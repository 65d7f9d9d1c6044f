"""MaxText's checkpoints as tensors under Hugging Face names: Orbax's trees of parameters, scanned and not.

An array of layers is read whole, since that is how it lies on the disk, and kept until each of its tensors has been
read once or another array is: in the order of the mapping that is one array at a time. Layouts are told apart by paths
and shapes (``maxtext_families``). Facts from MaxText's ``detect_and_extract_checkpoint`` and
``param_key_parts_from_path`` (``checkpoint_conversion/utils/utils.py``): what stands around the parameters in
checkpoints of its Linen and NNX trainers.

Left out on purpose: its adapters and quantised checkpoints, and towers for images, which stay behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from luthier.checkpoint.maxtext_families import describe, vocabulary
from luthier.checkpoint.maxtext_layout import Leaf
from luthier.checkpoint.tensors import Stored
from luthier.errors import UserError
from luthier.model.families import gemma

_LISTED = 20


class _Array(NamedTuple):
    """What the checkpoint's metadata say of one array: where it is in Orbax's tree, its shape and type."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def read_tensors(items: Path, config: Mapping[str, Any], model: str) -> dict[str, Stored]:
    """Return {Hugging Face name: tensor} of the parameters in Orbax's folder ``items``, from the metadata alone.

    ``config`` is the ``config.json`` of the model that it is of, ``model`` that model's name. Raises UserError where
    the folder is damaged or holds another model.
    """
    arrays = _arrays(items)
    leaves = _layout(arrays, config, model, items)
    reader = _Reader(items, arrays, leaves)
    kinds = {arrays[path].dtype for path, leaf in leaves.items() if not leaf.rule.changes}
    found = {}
    for path, leaf in leaves.items():
        dtype = arrays[path].dtype
        # What MaxText changes may lie in a wider type than all the rest, which keeps it exact: it comes back as theirs.
        if leaf.rule.changes and len(kinds) == 1:
            dtype = min(dtype, *kinds, key=lambda kind: kind.itemsize)
        for name in leaf.members:
            found[name] = Stored(leaf.tensor_shape, dtype, partial(reader.read, path, name, dtype))
    return found


def text_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of what MaxText has of a model: of Gemma 3 with a tower for images the text alone."""
    if config["model_type"] != "gemma3":
        return dict(config)
    text = gemma.text_only(config)
    return text | {"vocab_size": vocabulary("gemma3", text["vocab_size"])}


class _Reader:
    """Reads tensors out of arrays, of which it holds one until each tensor in it has been read or another is asked."""

    def __init__(self, items: Path, arrays: Mapping[str, _Array], leaves: Mapping[str, Leaf]) -> None:
        self._items, self._arrays, self._leaves = items, arrays, leaves
        self._held: tuple[str, np.ndarray] | None = None
        self._unread: set[str] = set()
        self._lock = Lock()

    def read(self, path: str, name: str, dtype: np.dtype) -> np.ndarray:
        """Return the tensor ``name`` of the array at ``path``."""
        leaf = self._leaves[path]
        with self._lock:
            if self._held is None or self._held[0] != path:
                self._held = None  # before the next array is there
                self._held, self._unread = (path, _read_array(self._items, self._arrays[path])), set(leaf.members)
            tensor = leaf.tensor(self._held[1], name, dtype)
            self._unread.discard(name)
            if not self._unread:
                self._held = None
            return tensor


def _arrays(items: Path) -> dict[str, _Array]:
    """Return {path as MaxText's mapping has it: array}, of the parameters alone."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(items)).tree
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{items}: a damaged Orbax checkpoint ({_reason(error)}). Copy it again.") from None
    flat, _ = jax.tree.flatten_with_path(tree)
    entries = {tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys): entry for keys, entry in flat}
    found = {}
    for keys, entry in entries.items():
        path = _path(keys)
        random = any(key == "rngs" or key.endswith("_rngs") for key in keys)  # numbers that NNX keeps beside weights
        if path.startswith(("decoder/", "token_embedder/")) and getattr(entry, "shape", ()) and not random:
            found[path] = _Array(keys, tuple(entry.shape), np.dtype(entry.dtype))
    if not found:
        names = ", ".join(sorted({keys[0] for keys in entries})[:5])
        raise UserError(f"{items}: an Orbax checkpoint without MaxText's parameters (it holds {names}).")
    if any(path.endswith(("_lora_a", "_lora_b")) for path in found):
        raise UserError(f"{items}: an adapter in MaxText's layout. Merge it with MaxText's `to_huggingface`.")
    return found


def _path(keys: tuple[str, ...]) -> str:
    """Return the path of a parameter whatever trainer saved it: without what is around, layers' numbers in names."""
    parts: list[str] = []
    for key in keys:
        if key.isdigit() and parts:
            parts[-1] = f"{parts[-1]}_{key}"
        else:
            parts.append(key)
    while parts and parts[0] in ("params", "base"):
        parts = parts[1:]
    return "/".join(parts[:-1] if parts[-1:] == ["value"] else parts)


def _layout(found: Mapping[str, _Array], config: Mapping[str, Any], model: str, items: Path) -> dict[str, Leaf]:
    """Return the layout that the arrays have: of those that there are the one with the fewest faults, and with none."""
    tried = []
    for scanned, axis in ((True, 1), (True, 0), (False, 0)):
        leaves = describe(config, model, str(items), scanned=scanned, axis=axis)
        faults = _faults(found, leaves)
        if not faults:
            return leaves
        tried.append((len(faults), len(tried), faults))
    faults = sorted(min(tried)[2])
    more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    raise UserError(
        f"{items}: {len(faults)} arrays do not fit {model}:\n  "
        + "\n  ".join(faults[:_LISTED])
        + more
        + "\nSet model_name to the model that the checkpoint is of: its MaxText name, hub id, or a folder with its "
        "config.json."
    )


def _faults(found: Mapping[str, _Array], leaves: Mapping[str, Leaf]) -> list[str]:
    faults = [f"missing: {path} {_size(leaf.shape)}" for path, leaf in leaves.items() if path not in found]
    faults += [f"unexpected: {path} {_size(found[path].shape)}" for path in found if path not in leaves]
    for path in found.keys() & leaves.keys():
        shape, leaf = found[path].shape, leaves[path]
        if not leaf.fits(shape):
            faults.append(f"misshapen: {path} is {_size(shape)}, the model has {_size(leaf.shape)}")
        elif found[path].dtype.kind not in "fV":
            faults.append(f"not a float: {path} is {found[path].dtype}")
    return faults


def _read_array(items: Path, place: _Array) -> np.ndarray:
    import orbax.checkpoint as ocp

    def nested(value: Any) -> Any:
        for key in reversed(place.keys):
            value = {key: value}
        return value

    args = ocp.args.PyTreeRestore(
        item=nested(0), restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)), partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            array = checkpointer.restore(items, args=args)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{items}: {'/'.join(place.keys)} cannot be read ({reason}). Copy the checkpoint again."
        ) from None
    for key in place.keys:
        array = array[key]
    return array


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _reason(error: Exception) -> str:
    """Return what went wrong without all that tensorstore was asked to do."""
    return re.split(r"\n| \[\w+=", str(error).strip())[0]

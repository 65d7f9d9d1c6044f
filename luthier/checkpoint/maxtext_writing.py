"""A model written as MaxText lays it out: `0/items`, an Orbax tree of parameters, and beside it what MaxText ignores.

Arrays are put together and written one at a time, each in pieces that a host of several can read apart. With them lie
the model's ``config.json`` and its tokenizer, so that the folder can be named here again without more. Facts from
MaxText's ``save_checkpoint`` (``common/checkpointing.py``) and ``save_weights_to_checkpoint``
(``checkpoint_conversion/utils/utils.py``): the names around the parameters, the step, and that ``scan_layers`` is told.

Left out on purpose: optimizer state, which is another optimizer's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.checkpoint import disk, maxtext
from luthier.checkpoint import folder as whole
from luthier.checkpoint.maxtext_families import describe
from luthier.checkpoint.maxtext_layout import Leaf
from luthier.checkpoint.source import Source
from luthier.checkpoint.state import not_raised_anyway
from luthier.checkpoint.tensors import Stored

_CHUNK_BYTES = 1 << 28
_FLOAT32 = np.dtype(np.float32)


def write(
    folder: Path,
    source: Source,
    tensors: Mapping[str, Stored],
    write_tokenizer: Callable[[Path], None],
    *,
    scanned: bool = True,
    exact: bool = True,
    card: str = "",
) -> int:
    """Write ``folder`` from ``tensors`` under Hugging Face names, and put it in its place when it is whole.

    An array has its tensors' type. If ``exact``, those whose values MaxText changes are fp32 where 16 bits would lose
    some. Returns the size of the arrays in bytes. Raises UserError for a model that MaxText's layout has no place for,
    RunError where the disk refuses.
    """
    leaves = describe(source.config, source.model or source.name, source.name, scanned=scanned)
    arrays = {path: _array(leaf, tensors, exact) for path, leaf in leaves.items()}
    size = sum(array.nbytes for array in arrays.values())

    def write_more(new: Path) -> None:
        _save(new, arrays, scanned)
        write_tokenizer(new)

    config = maxtext.text_only(source.config) | {"_name_or_path": source.hub_id or source.model or source.name}
    documents = {"config.json": config, "README.md": card}
    then = f"Have {size / 1e9:.2f} GB free and the folder writable, and run the same command again."
    with disk.writing(folder, "the checkpoint", lambda: then):
        whole.write(folder, {}, documents, write_more)
    return size


def _array(leaf: Leaf, tensors: Mapping[str, Stored], exact: bool) -> Stored:
    dtype = np.result_type(*(tensors[name].dtype for name in leaf.members))
    if exact and leaf.rule.changes and not (leaf.rule.only_scales_exactly and dtype != np.float16):
        dtype = _FLOAT32
    return Stored(leaf.shape, dtype, partial(_put_together, leaf, tensors, dtype))


def _put_together(leaf: Leaf, tensors: Mapping[str, Stored], dtype: np.dtype) -> np.ndarray:
    array = np.zeros(leaf.shape, dtype)
    for name in leaf.members:
        leaf.fill(array, name, tensors[name].read())
    return array


def _save(folder: Path, arrays: Mapping[str, Stored], scanned: bool) -> None:
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(not_raised_anyway)
    types = ocp.type_handlers
    # Orbax wants to know of its own arrays, too, of which there are none here.
    known = (
        (Stored, _one_by_one(types.NumpyHandler)(deepcopy_host_arrays=False)),
        (int, _one_by_one(types.ScalarHandler)()),
        (jax.Array, types.ArrayHandler()),
    )
    registry = types.create_type_handler_registry(*known)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    tree = {"step": 0, "params": {"params": _nested(arrays)}}
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers={"items": handler}) as manager:
        items = ocp.args.PyTreeSave(tree, save_args=pieces)
        manager.save(0, args=ocp.args.Composite(items=items), custom_metadata={"scan_layers": scanned})


def _one_by_one(handler: Any) -> Any:
    """Return the kind of Orbax's writers that reads a value when its turn comes, and ends before the next has its.

    So one is in memory at a time, and after a failure nothing is still being written.
    """

    class OneByOne(handler):
        async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Any:
            futures = []
            for value, info, arg in zip(values, infos, args, strict=True):
                read = value.read() if isinstance(value, Stored) else value
                for future in await super().serialize([read], [info], [arg]):
                    future.result()
                    futures.append(future)
            return futures

    return OneByOne


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return tree

"""`luthier convert`: the same weights in another layout or type, with an adapter merged into them where one is named.

Tensors are read, changed and written one at a time. Left out on purpose: quantising below 8 bits, which llama.cpp's own
`llama-quantize` does from the file that this writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from luthier.checkpoint import gguf_writing, huggingface, maxtext_writing, tokenizer
from luthier.checkpoint import source as sources
from luthier.checkpoint.card import converted_card
from luthier.checkpoint.gguf_writing import Kind
from luthier.checkpoint.tensors import Stored
from luthier.commands import terminal
from luthier.config import ConvertConfig
from luthier.errors import UserError
from luthier.model import param
from luthier.model.model import Model
from luthier.model.param import Tree

_TYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16")}
_KINDS: dict[str, Kind] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def run(config: ConvertConfig) -> None:
    """Run ``luthier convert``.

    Raises UserError for what the user can mend, such as a place that is taken, before anything is written, and RunError
    where the disk refuses.
    """
    path = Path(config.output_path).expanduser()
    if path.exists():
        raise UserError(f"output_path={config.output_path}: is there already. Name another, or remove it first.")
    source = sources.resolve(config)
    if config.lora_path:
        source = sources.merge(source, config.lora_path, config.hf_access_token)
    model = Model.from_hf(source.config, source.name)
    huggingface.check(source, model.spec, model.config.ignored)
    words = tokenizer.load(source, config.tokenizer_path, config.hf_access_token)
    tensors = _kept(source.tensors, model)
    if config.format == "gguf":
        kind = _main_kind(tensors) if config.gguf_type == "auto" else config.gguf_type
        gguf_writing.write(path, source, source.exact_tensors, model.config, words, kind)
        size = path.stat().st_size
    else:
        if config.dtype != "auto":
            tensors = _as_type(_kept(source.exact_tensors, model), model.spec, config.dtype)
        save, card = partial(tokenizer.save, words), converted_card(source)
        if config.format == "maxtext":
            exact = config.dtype == "auto"
            size = maxtext_writing.write(
                path, source, tensors, save, scanned=config.scan_layers, exact=exact, card=card
            )
        else:
            huggingface.write(path, tensors, source, save, card=card)
            size = sum(tensor.nbytes for tensor in tensors.values())
    merged = f", {source.adapter} merged into it" if source.adapter else ""
    terminal.messages().print(
        f"{path}: {source.name}{merged}; {param.count(model.spec):,} weights, {size / 1e9:.2f} GB"
    )


def _kept(tensors: Mapping[str, Stored], model: Model) -> dict[str, Stored]:
    """Return the model's tensors, and those of the checkpoint that it leaves out on purpose."""
    wanted, ignored = param.tensor_shapes(model.spec), model.config.ignored
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or any(re.fullmatch(pattern, name) for pattern in ignored)
    }


def _main_kind(tensors: Mapping[str, Stored]) -> Kind:
    """Return the kind that most of the weights have."""
    counts = dict.fromkeys(_KINDS, 0)
    for tensor in tensors.values():
        counts[str(tensor.dtype)] = counts.get(str(tensor.dtype), 0) + math.prod(tensor.shape)
    return _KINDS[max(_KINDS, key=counts.__getitem__)]


def _as_type(tensors: Mapping[str, Stored], spec: Tree, name: str) -> dict[str, Stored]:
    """Return ``tensors`` as the type ``name``, but for those that are kept in fp32 whatever the others are in."""
    exact = {tensor for each in param.leaves(spec).values() if each.exact for tensor in each.tensors()}
    wanted = _TYPES[name]
    return {
        key: tensor
        if key in exact or tensor.dtype not in _TYPES.values()
        else Stored(tensor.shape, wanted, partial(_cast, key, tensor, wanted))
        for key, tensor in tensors.items()
    }


def _cast(name: str, tensor: Stored, dtype: Any) -> np.ndarray:
    values = tensor.read()
    with np.errstate(over="ignore"):
        cast_values = values.astype(dtype)
    if dtype == np.float16 and np.isinf(cast_values).any() and np.isfinite(values).all():
        raise UserError(f"{name} has values beyond float16's 65504. Set dtype=bfloat16 or dtype=float32.")
    return cast_values

"""Adapters in PEFT's layout: ``adapter_model.safetensors`` and ``adapter_config.json``.

What is read and saved again is the same bit for bit where it was fp32, as trained adapters are. Left out on purpose:
merging (``merging``), and every method but LoRA, rsLoRA and DoRA of one rank over linear layers and experts, which is
refused by the name of the field that asks for more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from luthier import processes
from luthier.checkpoint import disk, placing, tensors
from luthier.checkpoint import folder as whole
from luthier.checkpoint import source as sources
from luthier.checkpoint import tokenizer as tokenizer_files
from luthier.checkpoint.source import Source
from luthier.checkpoint.tensors import Stored
from luthier.errors import UserError
from luthier.model import param as param_lib
from luthier.model.lora import Adapter
from luthier.model.param import Param, Tree
from luthier.model.targets import ALL_LINEAR

CONFIG, WEIGHTS = sources.ADAPTER_CONFIG, sources.ADAPTER_WEIGHTS
_PREFIX = "base_model.model."
_LISTED = 20
# Fields of adapter_config.json that change what is computed, and what they are where nothing is changed.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    **dict.fromkeys(
        (
            *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern"),
            *("exclude_modules", "layer_replication", "trainable_token_indices", "lora_bias", "use_qalora"),
            *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "use_bdlora"),
            *("monteclora_config", "lora_ga_config", "corda_config"),
        ),
        (False, [], {}, 0),
    ),
}
# Initialisations that change the base, so that the adapter is one of another model than its config names.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")


def read_config(place: Path) -> Adapter:
    """Return what the adapter in the folder ``place`` (of ``source.adapter_folder``) is.

    Raises UserError for what is not LoRA, or asks for something that is not supported.
    """
    config = _config(place)
    if str(config.get("peft_type")).upper() != "LORA":
        raise UserError(f"{place / CONFIG}: peft_type={config.get('peft_type')} is not supported. LORA is.")
    for name, plain in _PLAIN.items():
        if config.get(name) is not None and config[name] not in plain:
            raise UserError(
                f"{place / CONFIG}: {name}={json.dumps(config[name])} is not supported. Merge the adapter with PEFT "
                "(merge_and_unload) and give the merged model."
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise UserError(
            f"{place / CONFIG}: init_lora_weights={init} changes the base's weights, and they are not here. Save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion=..., which makes it one of the base itself."
        )
    return Adapter(
        rank=_number(config, "r", place, int),
        alpha=_number(config, "lora_alpha", place, float),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=_targets(config, place),
    )


def read_tensors(place: Path) -> dict[str, Stored]:
    """Return {name that PEFT 0.21 gives it: tensor}, whatever version or trainer wrote the adapter in ``place``.

    Raises UserError where the file is missing or damaged.
    """
    if not (place / WEIGHTS).is_file():
        pickled = " adapter_model.bin is a pickle: save it with a newer PEFT." * (place / "adapter_model.bin").is_file()
        raise UserError(f"{place}: no {WEIGHTS}.{pickled}")
    return {_named(name): tensor for name, tensor in tensors.read_safetensors(place / WEIGHTS).items()}


def load(place: Path, adapter_spec: Tree, mesh: Mesh) -> Tree:
    """Return the fp32 weights of the adapter in ``place``, as ``adapter_spec`` says; every process calls it.

    Raises UserError that lists every missing, unexpected and misshapen tensor.
    """
    found = read_tensors(place)
    check(found, adapter_spec, place)
    structure = placing.structure(adapter_spec)
    weights = structure.flatten_up_to(placing.empty(adapter_spec, "", jnp.float32, mesh))
    for number, param in enumerate(param_lib.leaves(adapter_spec).values()):
        for name, index in param.tensors().items():
            piece = param.from_tensor(found[name].read().astype(np.float32))
            weights[number] = placing.put(weights[number], param, index, piece)
    return jax.tree.unflatten(structure, weights)


def check(found: Mapping[str, Stored], adapter_spec: Tree, place: Path) -> None:
    """Compare an adapter's tensors with ``adapter_spec``. Raises UserError that lists all that differs."""
    wanted = param_lib.tensor_shapes(adapter_spec)
    faults = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    faults += [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in wanted]
    faults += [
        f"misshapen: {name} is {list(found[name].shape)}, the model asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if faults:
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise UserError(
            f"{place}: {len(faults)} tensors of the adapter do not fit the model:\n  "
            + "\n  ".join(sorted(faults)[:_LISTED])
            + f"{more}\nIs it an adapter of another model, or was {CONFIG} changed?"
        )


def save(
    place: Path,
    adapters: Tree,
    adapter_spec: Tree,
    adapter: Adapter,
    source: Source,
    tokenizer: Any,
    *,
    origin: Tree | None = None,
    chat_template: str = "",
    card: str = "",
) -> None:
    """Write the folder ``place`` as PEFT does, whole or not at all; every process calls it.

    With ``origin``, what PiSSA's adapters began as, the two are saved as one of twice the rank, so that the base needs
    no change (as PEFT's ``path_initial_model_for_weight_conversion`` does). ``chat_template`` replaces the tokenizer's
    own, ``card`` is the text of README.md. Where the disk refuses it is a RunError.
    """
    config, ours = outgoing(adapters, adapter_spec, adapter, source, origin)
    if processes.is_first():
        documents = {CONFIG: config, "README.md": card}
        write_tokenizer = partial(tokenizer_files.save, tokenizer, chat_template=chat_template)
        with disk.writing(place, "the adapter", lambda: "Make room, and run the same command again."):
            whole.write(place, {WEIGHTS: ours}, documents, write_tokenizer)
    else:
        for tensor in ours.values():
            tensor.read()  # gathering takes every process
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {place}")


def outgoing(
    adapters: Tree, adapter_spec: Tree, adapter: Adapter, source: Source, origin: Tree | None = None
) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return what ``save`` writes: the content of ``adapter_config.json``, and {name: tensor}, gathered when read."""
    arrays, spec = adapters, adapter_spec
    if origin is not None:
        arrays, spec, adapter = _converted(adapters, origin, adapter_spec, adapter)
    return _saved_config(adapter, adapter_spec, source), _outgoing(arrays, spec)


def _config(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{place / CONFIG}: not valid JSON: {error}. Take the adapter's original file.") from None
    if not isinstance(found, dict):
        raise UserError(f"{place / CONFIG}: not a JSON object. Take the adapter's original file.")
    return found


def _number(config: Mapping[str, Any], name: str, place: Path, kind: Callable[[Any], Any]) -> Any:
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0 or kind(value) != value:
        raise UserError(f"{place / CONFIG}: {name}={json.dumps(value)} is no positive number. Take the original file.")
    return kind(value)


def _targets(config: Mapping[str, Any], place: Path) -> str | tuple[str, ...]:
    """Return what is adapted, as ``targets.chosen`` takes it.

    Of a list, PEFT lets names be that the model has not; they are left out where the file has no tensors of theirs.
    """
    modules, parameters = config.get("target_modules") or [], _parameters(config, place)
    if isinstance(modules, str) and modules.lower() != ALL_LINEAR:
        either = (modules, *(rf".*\.{re.escape(name)}" for name in parameters))
        return "|".join(f"(?:{part})" for part in either) if parameters else modules
    there = {name.split(".lora_")[0].removeprefix(_PREFIX) for name in read_tensors(place)}
    if isinstance(modules, str):
        linear = {name.rpartition(".")[2] for name in there if not name.endswith((".experts", ".base_layer"))}
        return (*sorted(linear), *parameters)
    kept = [name for name in modules if any(own == name or own.endswith(f".{name}") for own in there)]
    return (*kept, *parameters)


def _parameters(config: Mapping[str, Any], place: Path) -> tuple[str, ...]:
    """Return what of ``target_parameters`` is adapted, by names that only experts' weights have."""
    named = config.get("target_parameters") or ()
    for name in named:
        if name.rpartition(".")[2] not in ("gate_up_proj", "down_proj"):
            raise UserError(
                f"{place / CONFIG}: target_parameters names {name}, which is not supported: of parameters only "
                "experts' gate_up_proj and down_proj can be adapted. Merge the adapter with PEFT (merge_and_unload)."
            )
    return tuple(name if "experts." in name else f"experts.{name}" for name in named)


def _named(name: str) -> str:
    """Return the name that PEFT 0.21 saves a tensor by: without the adapter's name, with the prefix."""
    name = re.sub(r"\.(lora_[AB])(?:\.[^.]+)?\.weight$", r".\1.weight", name)
    name = re.sub(r"\.lora_magnitude_vector(?:\.[^.]+)*$", ".lora_magnitude_vector", name)
    name = name if name.startswith(_PREFIX) else _PREFIX + name
    return name.replace(f"{_PREFIX}language_model.model.", f"{_PREFIX}model.language_model.")  # before Transformers 5


def _outgoing(arrays: Tree, spec: Tree) -> dict[str, Stored]:
    """Return {name: tensor} of our arrays, each gathered when it is read, in the order of names."""
    flat = placing.structure(spec).flatten_up_to(arrays)
    found = {}
    for array, param in zip(flat, param_lib.leaves(spec).values(), strict=True):
        for name, index in param.tensors().items():
            found[name] = Stored(param.tensor_shape, np.dtype(np.float32), partial(_gather, array, param, index))
    return dict(sorted(found.items()))


def _gather(array: jax.Array, param: Param, index: tuple[int, ...]) -> np.ndarray:
    tensor = np.empty(param.tensor_shape, np.float32)
    param.into_tensor(placing.take(array, index).astype(np.float32, copy=False), tensor)
    return tensor


def _converted(adapters: Tree, origin: Tree, adapter_spec: Tree, adapter: Adapter) -> tuple[Tree, Tree, Adapter]:
    """Return the adapter of twice the rank that adds ``adapters`` and takes ``origin`` off."""
    structure = placing.structure(adapter_spec)
    arrays, params = [], []
    flat = zip(structure.flatten_up_to(adapters), structure.flatten_up_to(origin), strict=True)
    for (path, param), (now, first) in zip(param_lib.leaves(adapter_spec).items(), flat, strict=True):
        axis = param.axes.index("rank")
        arrays.append(jnp.concatenate([now, -first if path.endswith("/b") else first], axis))
        params.append(replace(param, shape=arrays[-1].shape))
    twice = replace(adapter, rank=2 * adapter.rank, alpha=adapter.alpha * (math.sqrt(2) if adapter.rslora else 2))
    return jax.tree.unflatten(structure, arrays), jax.tree.unflatten(structure, params), twice


def _saved_config(adapter: Adapter, adapter_spec: Tree, source: Source) -> dict[str, Any]:
    """Return the fields that PEFT has long had, and those of experts' weights only where they are adapted."""
    modules, parameters = _saved_targets(adapter, adapter_spec)
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": source.hub_id or str((source.items or source.path).absolute()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.dora,
        "use_rslora": adapter.rslora,
    }


def _saved_targets(adapter: Adapter, adapter_spec: Tree) -> tuple[list[str], list[str]]:
    """Return the names by which PEFT finds the same modules, and the same weights of experts.

    Whole names where shorter ones could mean others too: those of a regular expression, and beside other towers.
    """
    linear, experts = set(), set()
    for path, param in param_lib.leaves(adapter_spec).items():
        owners = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in param.tensors()}
        if "expert" in param.axes:
            experts |= {f"{owner.removesuffix('.base_layer')}.{path.split('/')[-2]}" for owner in owners}
        else:
            linear |= owners
    if any("language_model" in name for name in linear | experts):
        return sorted(linear), sorted(experts)
    if adapter.targets == ALL_LINEAR:
        return sorted({_end(name, 1) for name in linear}), sorted({_end(name, 3) for name in experts})
    if isinstance(adapter.targets, str):
        return sorted(linear), sorted(experts)
    of_experts = [name for name in adapter.targets if any(own.endswith(f".{name}") or own == name for own in experts)]
    return [name for name in adapter.targets if name not in of_experts], of_experts


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])

"""Adapters for tests: ours with random numbers, and PEFT's model with the same ones."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from luthier.model import lora, param, targets
from luthier.model.lora import Adapter
from luthier.model.model import Model

NAME = "default"  # what PEFT calls an adapter that is given no name


def random_adapters(model: Model, adapter: Adapter, seed: int = 7) -> Any:
    """Return adapters of which no number is what it begins as; magnitudes stay near the norms of random weights."""
    random = np.random.default_rng(seed)

    def draw(declared: param.Param) -> jax.Array:
        middle, spread = (1.0, 0.2) if declared.init == "ones" else (0.0, 0.1)
        return jnp.asarray(random.normal(middle, spread, declared.shape), jnp.float32)

    return param.map_spec(draw, lora.spec(model.spec, adapter))


def peft_twin(twin: Any, model: Model, adapter: Adapter, adapters: Any = None, **config: Any) -> Any:
    """Return PEFT's model around Transformers' ``twin``, with our adapter's numbers where they are given."""
    import peft
    import torch
    from peft.utils import transformers_weight_conversion

    found = lora.units(model.spec, adapter)
    names = [name for unit in found for name in unit.names if not unit.experts]
    settings = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "lora_dropout": adapter.dropout,
        "target_modules": names,
        "target_parameters": [name for unit in found for name in unit.names if unit.experts] or None,
    }
    # For some mixtures of experts PEFT takes each target that ends in `down_proj` for the experts': ours are as named.
    original = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        adapted = peft.get_peft_model(twin, peft.LoraConfig(**settings | config))
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = original
    if adapters is not None:
        tensors = tensors_of(lora.spec(model.spec, adapter), adapters)
        own = {in_memory(name): torch.from_numpy(tensor) for name, tensor in tensors.items()}
        told = adapted.load_state_dict(own, strict=False)
        assert not told.unexpected_keys, told.unexpected_keys
        assert not [name for name in told.missing_keys if "lora_" in name]
    return adapted


def in_memory(name: str) -> str:
    """Return what PEFT calls a tensor of its file in its model."""
    if name.endswith("lora_magnitude_vector"):
        return f"{name}.{NAME}.weight"
    return re.sub(r"\.(lora_[AB])\.", rf".\1.{NAME}.", name)


def tensors_of(spec: Any, adapters: Any) -> dict[str, np.ndarray]:
    """Return adapters, or their gradients, by the names and in the shapes of PEFT's file."""
    found: dict[str, np.ndarray] = {}

    def write(declared: param.Param, whole: jax.Array) -> None:
        for name, place in declared.tensors().items():
            found[name] = np.zeros(declared.tensor_shape, np.float32)
            declared.into_tensor(np.asarray(whole[place]), found[name])

    param.map_spec(write, spec, adapters)
    return found


def merged(model: Model, base: Any, adapter: Adapter, adapters: Any) -> Any:
    """Return the base's weights with the adapters added, formed as whole matrices in fp64."""
    params = jax.tree.map(np.asarray, base)
    leaves = dict(zip(param.leaves(model.spec), jax.tree.leaves(params), strict=True))
    for unit in lora.units(model.spec, adapter):
        own = adapters
        for name in unit.path:
            own = own[name]
        a, b = np.asarray(own["a"], np.float64), np.asarray(own["b"], np.float64)
        delta = adapter.scale * (b @ a)
        for member in unit.members:
            key = "/".join(member.path)
            matrix = np.asarray(member.matrix(leaves[key]), np.float64) + np.asarray(member.rows(delta, -2))
            if adapter.dora:
                magnitude = np.asarray(member.rows(own["magnitude"], -1), np.float64)
                matrix *= (magnitude / np.linalg.norm(matrix, axis=-1))[..., None]
            leaves[key] = unmatrix(member, matrix)
    return jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(x, jnp.float32) for x in leaves.values()])


def unmatrix(member: targets.Member, matrix: np.ndarray) -> np.ndarray:
    """Return a weight in our layout from its matrix."""
    import einops

    out, into = (" ".join(side) for side in member.sides)
    names = [name for name in member.param.names if member.axis(name) != "expert"]
    sizes = dict(zip(member.param.names, member.param.slice_shape, strict=True))
    pattern = f"... ({out}) ({into}) -> ... {' '.join(names)}"
    return einops.rearrange(matrix, pattern, **{name: sizes[name] for name in names})

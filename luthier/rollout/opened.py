"""A model opened for sampling or scoring: from the keys to weights, tokenizer and engine.

Left out on purpose: training's way to the same weights (``train.job``), which has an optimizer to plan for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from luthier import mesh as mesh_lib
from luthier import runtime
from luthier.checkpoint import huggingface, peft, placing, source, tokenizer
from luthier.checkpoint.source import Source
from luthier.config import InferenceKeys, SampleKeys
from luthier.model import lora, param
from luthier.model.compute import Compute, chosen
from luthier.model.lora import Adapter
from luthier.model.model import Model
from luthier.model.param import Tree
from luthier.rollout import adapters
from luthier.rollout.engine import Sampling
from luthier.rollout.local import LocalEngine


@dataclass(frozen=True)
class Described:
    """A model but for its weights: where it comes from, what it is, and its tokenizer."""

    source: Source
    model: Model
    tokenizer: Any

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model was made for, where its configuration says."""
        return self.source.context_length


@dataclass(frozen=True)
class Opened(Described):
    """A model with its weights (in the type that it computes in) on a mesh.

    ``adapter`` is the place of the one that is in every request, ``attached`` itself with its weights, ``adapters``
    the names of those that requests choose from; ``quantization`` is the kind of the base's weights, "" where they are
    floats.
    """

    params: Tree
    mesh: Mesh
    compute: Compute
    adapter: str = ""
    attached: tuple[Adapter, Tree] | None = None
    adapters: tuple[str, ...] = ()
    quantization: str = ""

    @property
    def name(self) -> str:
        """What is sampled from, in words."""
        kind = f" ({self.quantization})" if self.quantization else ""
        return f"{self.source.name}{kind}" + (f" with {self.adapter}" if self.adapter else "")


class Named(NamedTuple):
    """An adapter's folder, and what it is."""

    folder: Path
    adapter: Adapter


def open_model(
    keys: InferenceKeys,
    look: Callable[[Source, Any], None] | None = None,
    modules: Mapping[str, str] | None = None,
) -> Opened:
    """Read what ``keys`` name. The mesh is to be put in use (``mesh.use``) around all that computes with it.

    ``look`` is given the source and the tokenizer before weights are read, to refuse in time what does not suit them.
    ``modules`` are adapters to choose from by request, {name: path}. Raises UserError for what is not there or does not
    fit together.
    """
    place = source.resolve(keys)
    model = Model.from_hf(place.config, place.name)
    alone, several = _adapters(keys, model, modules or {})
    runtime.start(keys)
    mesh = mesh_lib.make(keys)
    with mesh_lib.use(mesh):
        compute = chosen(keys)
        param.shardings(model.spec, mesh)  # raises where the mesh does not divide the model
        model.check_kernel(compute)
        words = tokenizer.load(place, keys.tokenizer_path or _own_tokenizer(alone), keys.hf_access_token)
        if look is not None:
            look(place, words)
        params = _params(keys, place, model, compute.dtype, mesh)
        attached = None if alone is None else _loaded(alone, model, mesh)
        if attached is not None:
            params = lora.attach(model.spec, params, *attached)
        if several:
            loaded = {name: _loaded(named, model, mesh) for name, named in several.items()}
            params = adapters.together(model.spec, params, loaded)
    names = tuple(several)
    return Opened(place, model, words, params, mesh, compute, keys.lora_path, attached, names, keys.quantization)


def open_engine(keys: InferenceKeys, opened: Opened) -> LocalEngine:
    """Return the embedded engine on an opened model. To be called with its mesh in use."""
    return LocalEngine(
        opened.model,
        opened.params,
        opened.compute,
        opened.mesh,
        keys,
        tokenizer=opened.tokenizer,
        context_length=opened.context_length,
        seed=keys.seed,
        adapters=opened.adapters,
    )


def end_tokens(of: Described) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of the model's configurations and of its tokenizer."""
    places = (of.source.generation_config or {}, of.source.config, of.source.text)
    named = [place.get("eos_token_id") for place in places]
    listed = [ids if isinstance(ids, Sequence) else [ids] for ids in [*named, of.tokenizer.eos_token_id]]
    size = of.model.config.vocab_size
    return tuple(sorted({token for ids in listed for token in ids if token is not None and 0 <= token < size}))


def prompt_seeds(seed: int, count: int) -> list[int]:
    """Return a seed for each of ``count`` prompts: with one for all, prompts would share their luck."""
    states = (np.random.SeedSequence([seed, index]).generate_state(1)[0] for index in range(count))
    return [int(state >> 1) for state in states]  # 31 bits: an int32 everywhere


def sampling(keys: SampleKeys, of: Described) -> Sampling:
    """Return how ``keys`` want tokens drawn, with the model's ``generation_config.json`` for what they leave open."""
    own = of.source.generation_config or {}
    own = {"temperature": 0.0} if own.get("do_sample") is False else own
    usual = Sampling()
    drawn = {}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        choices = (getattr(keys, name), own.get(name), getattr(usual, name))
        drawn[name] = next(choice for choice in choices if choice is not None)
    ends = end_tokens(of) if keys.stop_token_ids is None else tuple(keys.stop_token_ids)
    return replace(
        usual,
        **drawn,
        max_new_tokens=keys.max_new_tokens,
        stop_token_ids=() if keys.ignore_eos else ends,
        stop=tuple(keys.stop),
    )


def _adapters(keys: InferenceKeys, model: Model, modules: Mapping[str, str]) -> tuple[Named | None, dict[str, Named]]:
    """Return the adapter of ``lora_path`` and those of ``modules``, of which nothing but their settings is read yet."""

    def read(path: str, key: str) -> Named:
        folder = source.adapter_folder(path, key, keys.hf_access_token)
        named = Named(folder, peft.read_config(folder))
        lora.units(model.spec, named.adapter)  # raises where the model has not what it adapts
        return named

    several = {name: read(path, f"lora_modules: {name}") for name, path in modules.items()}
    adapters.check(model.spec, {name: named.adapter for name, named in several.items()})
    return read(keys.lora_path, "lora_path") if keys.lora_path else None, several


def _own_tokenizer(alone: Named | None) -> str:
    """Return the folder of an adapter that was saved with its tokenizer, and so with the template it was trained by."""
    found = alone is not None and (alone.folder / tokenizer.CONFIG).is_file()
    return str(alone.folder) if alone is not None and found else ""


def _loaded(named: Named, model: Model, mesh: Mesh) -> tuple[Adapter, Tree]:
    return named.adapter, peft.load(named.folder, lora.spec(model.spec, named.adapter), mesh)


def _params(keys: InferenceKeys, place: Source, model: Model, dtype: Any, mesh: Mesh) -> Tree:
    if place.kind == "random":
        return placing.random(model.spec, jax.random.key(keys.seed), keys.quantization, dtype, mesh)
    return huggingface.load(place, model.spec, dtype, mesh, model.config.ignored, keys.quantization)

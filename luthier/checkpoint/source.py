"""What ``load_parameters_path`` and ``model_name`` mean: a place with a config and tensors.

Cheap: no jax and no Transformers, so that a wrong path is refused at once; a hub model's small files are fetched here
and its weights when they are first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from luthier import remote
from luthier.checkpoint import bucket, gguf, hub, maxtext_names, quantised, tensors
from luthier.config import SourceKeys
from luthier.errors import UserError, did_you_mean
from luthier.model import published

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ACCEPTED = "Give a Hugging Face folder, a hub id, a .gguf file, a MaxText checkpoint or a Luthier run."
_WEIGHTS = (tensors.SINGLE, tensors.INDEX)
_MAXTEXT_ITEMS = ("items", "model_params", "model")  # "items": MaxText's pre-training; the others: its SFT and RL


@dataclass(frozen=True)
class Source:
    """A model to start from.

    ``name`` is what a model card calls it, ``path`` its folder or ``.gguf`` file, ``config`` its ``config.json``,
    ``generation_config`` the file of that name where there is one, and ``hub_id`` is set where it came from the hub.
    ``random`` has no tensors: its weights are to be initialised. ``adapter`` is the folder of the adapter, if any, that
    is merged into the tensors as they are read. ``items`` is the folder of a MaxText checkpoint's arrays, whose files
    do not say of which model they are: ``config`` is that of ``model``, and ``path`` where its tokenizer may be.
    """

    kind: Literal["huggingface", "gguf", "maxtext", "random"]
    name: str
    path: Path
    config: dict[str, Any]
    hub_id: str = ""
    generation_config: dict[str, Any] | None = None
    token: str | None = field(default=None, repr=False)
    adapter: Path | None = None
    items: Path | None = None
    model: str = ""

    @cached_property
    def tensors(self) -> Mapping[str, tensors.Stored]:
        """{Hugging Face name: tensor}, from the headers alone; a hub model's weights are fetched by the first look.

        Raises UserError where they are missing, damaged or of a type that cannot be read, or an adapter does not fit.
        """
        return self._base if self.adapter is None else self._merged(exact=False)

    @cached_property
    def exact_tensors(self) -> Mapping[str, tensors.Stored]:
        """``tensors``, with those that an adapter is merged into in the fp32 that they are merged in."""
        return self._base if self.adapter is None else self._merged(exact=True)

    def _merged(self, exact: bool) -> Mapping[str, tensors.Stored]:
        from luthier.checkpoint import merging  # which needs jax

        assert self.adapter is not None
        return merging.merged(self._base, self.config, self.name, self.adapter, exact)

    @cached_property
    def _base(self) -> Mapping[str, tensors.Stored]:
        if self.kind == "random":
            return {}
        if self.kind == "gguf":
            return gguf.read_tensors(self.path)
        if self.items is not None:
            from luthier.checkpoint import maxtext  # which needs jax

            return maxtext.read_tensors(self.items, self.config, self.model)
        folder = self.path
        if self.hub_id:
            patterns = [*hub.SMALL_FILES, *hub.WEIGHT_FILES]
            folder = hub.fetch(self.hub_id, patterns, self.token, revision=self.path.name)
        return quantised.as_floats(tensors.read_folder(folder), self.config, folder)

    @property
    def text(self) -> dict[str, Any]:
        """What ``config`` says of the text model: of a multimodal one, its ``text_config`` before the rest."""
        return self.config | (self.config.get("text_config") or {})

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model was made for, where ``config`` says."""
        return self.text.get("max_position_embeddings")


def resolve(keys: SourceKeys) -> Source:
    """Return the source that ``load_parameters_path`` names, by default ``model_name``.

    An adapter is one too: its base, which ``model_name`` names or else its own config, with the adapter merged into it.

    Raises UserError where it is not there, has no config, or is of a kind that cannot be read.
    """
    random = keys.load_parameters_path == "random"
    name = keys.model_name if random or not keys.load_parameters_path else keys.load_parameters_path
    key = "model_name" if name == keys.model_name else "load_parameters_path"
    source = _find(name, key, keys.hf_access_token, base="" if key == "model_name" else keys.model_name)
    if random:
        return replace(source, kind="random", adapter=None, items=None)
    return source


def merge(source: Source, path: str, token: str | None = None) -> Source:
    """Return ``source`` with the adapter at ``path`` merged into it.

    Raises UserError where there is none, or ``source`` has one already.
    """
    if source.adapter is not None:
        raise UserError(
            f"lora_path={path}: {source.name} is an adapter itself. Merge that one first (`luthier convert`), and give "
            "the result as load_parameters_path."
        )
    return replace(source, adapter=adapter_folder(path, "lora_path", token))


def adapter_folder(name: str, key: str, token: str | None = None) -> Path:
    """Return the local folder of the adapter that ``name`` means: its own, a run that trained it, or a hub id's.

    Raises UserError, of ``key``, where there is none.
    """
    path = bucket.bring(name, key) if remote.is_url(name) else Path(name).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        there = f"no {ADAPTER_CONFIG} there" if path.exists() else "no such folder"
        raise UserError(f"{key}={name}: {there}. Give a folder in PEFT's layout, a run that trained one, or a hub id.")
    folder = hub.fetch(name, [*hub.SMALL_FILES, *hub.WEIGHT_FILES], token)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{key}={name}: has no {ADAPTER_CONFIG}, so it is no adapter in PEFT's layout.")
    return folder


def _find(name: str, key: str, token: str | None, base: str = "") -> Source:
    """``base`` names the model of an adapter, by default the one in its config."""
    path = bucket.bring(name, key) if remote.is_url(name) else Path(name).expanduser()
    if path.is_file():
        return _file(path, name, key)
    if path.is_dir():
        if _is_adapter(path) or (_is_adapter(path / "adapter") and not (path / "model" / "config.json").is_file()):
            return _adapted(adapter_folder(str(path), key), name, key, token, base)
        return _folder(path, name, key, token, base)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or "\\" in name:
        raise UserError(f"{key}={name}: no such file or folder. {_ACCEPTED}")
    hub_id = maxtext_names.HUB_IDS.get(name, name)
    if "/" not in hub_id:
        hint = did_you_mean(name, list(maxtext_names.HUB_IDS))
        raise UserError(f"{key}={name}: no such folder, and no model name known here.{hint} {_ACCEPTED}")
    folder = hub.fetch(hub_id, hub.SMALL_FILES, token)
    if _is_adapter(folder):
        return _adapted(adapter_folder(hub_id, key, token), hub_id, key, token, base)
    return replace(_hugging_face(folder, hub_id, f"{key}={name}"), hub_id=hub_id, token=token)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model beside it."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in _WEIGHTS)


def _adapted(folder: Path, name: str, key: str, token: str | None, base: str) -> Source:
    """Return the base of the adapter in ``folder``, with that merged into it."""
    named = base or _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    if not named:
        raise UserError(f"{key}={name}: its {ADAPTER_CONFIG} names no base. Set model_name to the model it adapts.")
    beside = folder / named
    try:
        found = _find(str(beside) if beside.exists() else named, "model_name", token)
    except UserError as error:
        raise UserError(f"{key}={name}: an adapter of {named}, which cannot be read. {error}") from None
    if found.adapter is not None:
        raise UserError(
            f"{key}={name}: an adapter of {named}, which is an adapter too. Merge that first (`luthier convert`), and "
            "set model_name to the result."
        )
    return replace(found, name=name, adapter=folder)


def _file(path: Path, name: str, key: str) -> Source:
    if path.suffix != ".gguf":
        raise UserError(f"{key}={name}: a file that is not a .gguf. {_ACCEPTED}")
    return Source("gguf", path.stem, path, gguf.read_config(path))


def _folder(folder: Path, name: str, key: str, token: str | None, model: str) -> Source:
    """``model`` names the one that a MaxText checkpoint is of, by default the one whose config lies beside it."""
    place = f"{key}={name}"
    items = None if any((folder / each).is_file() for each in _WEIGHTS) else _maxtext_items(folder)
    if items is not None:
        return _maxtext(items, name, place, token, model)
    if (folder / "config.json").is_file():
        return _hugging_face(folder, name, place)
    if (folder / "model" / "config.json").is_file():
        return _hugging_face(folder / "model", name, place)
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{place}: a Luthier run that has not written its model/ yet. Run its command again to finish it."
        )
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        raise UserError(f"{place}: a folder of GGUF files without config.json. Name one file: {folder / files[0]}.")
    raise UserError(f"{place}: no config.json in this folder. {_ACCEPTED}")


def _hugging_face(folder: Path, name: str, place: str) -> Source:
    config, generation = _read_config(folder, place), folder / "generation_config.json"
    # Needed only after training, when a mistake in it would come too late.
    return Source(
        "huggingface", name, folder, config, generation_config=_read_json(generation) if generation.is_file() else None
    )


def _maxtext_items(folder: Path) -> Path | None:
    """Return the arrays that ``folder`` means: its own, a step's, or those of the newest step of a run."""
    steps = sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    for place in (folder, *reversed(steps)):
        for items in (place, *(place / name for name in _MAXTEXT_ITEMS)):
            if (items / "_METADATA").is_file():
                return items
    below = folder / "checkpoints"
    return _maxtext_items(below) if below.is_dir() else None


def _maxtext(items: Path, name: str, place: str, token: str | None, model: str) -> Source:
    beside = next((path for path in (items, *items.parents[:2]) if (path / "config.json").is_file()), None)
    if model:
        found = _released(model, items, token)
    elif beside is not None:
        found = _hugging_face(beside, str(beside), place)
    else:
        raise UserError(
            f"{place}: a MaxText checkpoint, which does not say of which model it is. Set model_name to its MaxText "
            "name, its hub id, or a folder with its config.json."
        )
    config = found.config
    if config["model_type"] == "gemma3":  # of which MaxText has the text model alone
        from luthier.checkpoint import maxtext  # which needs jax

        config = maxtext.text_only(config)
    model = found.hub_id or model or str(config.get("_name_or_path") or name)
    return replace(found, kind="maxtext", name=name, config=config, items=items, model=model, hub_id="")


def _released(model: str, items: Path, token: str | None) -> Source:
    """Return the source of a released model's config: without a network, the one that is known here."""
    try:
        return _find(model, "model_name", token)
    except UserError:
        hub_id = maxtext_names.HUB_IDS.get(model, model)
        known = published.find(hub_id)
        if known is None:
            raise
        return Source("huggingface", model, items, dict(known.config), hub_id=hub_id)


def _read_config(folder: Path, place: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{place}: no config.json there. {_ACCEPTED}")
    config = _read_json(path)
    if "model_type" not in config:
        raise UserError(f"{path}: no `model_type`, so it is not a model's config.json.")
    if not isinstance(config.get("text_config") or {}, dict):
        raise UserError(f"{path}: its `text_config` is not a JSON object. Take the model's original file.")
    quantised.check(config, place)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path}: not valid JSON: {error}. Download it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Make it readable.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object. Take the model's original file.")
    return content

"""A model in a bucket -> its copy on this machine, of which only what a model is made of is brought.

Left out on purpose: reading tensors without a copy; each machine of a run brings its own, once.
"""

from __future__ import annotations

from pathlib import Path

from luthier import remote
from luthier.checkpoint import hub
from luthier.errors import UserError

_CONFIGS = ("config.json", "adapter_config.json", "model/config.json", "adapter/adapter_config.json")
_CONVERTED = "0/items/_METADATA"  # with config.json above, what `luthier convert` writes for MaxText
_ARRAYS = ("_METADATA", "items/_METADATA", "model_params/_METADATA", "model/_METADATA")


def bring(url: str, key: str) -> Path:
    """Return the local copy of a Hugging Face folder, a run's result, an adapter, a GGUF file or MaxText's arrays.

    Raises UserError, of ``key``, where there is none of them.
    """
    url = url.rstrip("/")
    if url.endswith(".gguf"):
        return remote.fetch(url, key)
    if remote.holds(url, _CONVERTED, key) and remote.holds(url, "config.json", key):
        return remote.fetch(url, key, deep=True)
    for config in _CONFIGS:
        if remote.holds(url, config, key):
            return remote.fetch(_beside(url, config), key, [*hub.SMALL_FILES, *hub.WEIGHT_FILES])
    for arrays in _ARRAYS:
        if remote.holds(url, arrays, key):
            return remote.fetch(_beside(url, arrays), key, deep=True)
    raise UserError(
        f"{key}={url}: no config.json, no adapter_config.json and no arrays of a MaxText checkpoint there. "
        "Give the folder that holds them, or a .gguf file."
    )


def _beside(url: str, name: str) -> str:
    return f"{url}/{name}".rpartition("/")[0]

"""Datasets of the Hugging Face hub, and folders that ``datasets`` saved, as splits of rows.

Left out on purpose: streaming; a hub dataset is downloaded once and memory-mapped from then on. ``datasets`` itself
retries an unreachable hub for about 25 seconds, so the hub is asked once, briefly, before it is handed over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import UserError

_PATIENCE_SECONDS = 10.0


class HubRows:
    """One split of a ``datasets.Dataset``, memory-mapped."""

    def __init__(self, dataset: Any, source: str):
        self.source = source
        self._dataset = dataset

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset's columns."""
        return tuple(self._dataset.column_names)

    @property
    def fingerprint(self) -> str:
        """The one that ``datasets`` keeps."""
        return str(self._dataset._fingerprint)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[index]

    def place(self, index: int) -> str:
        """Dataset, split and row, from 1."""
        return f"{self.source}, row {index + 1}"


def saved_splits(folder: Path, key: str) -> dict[str, Any]:
    """Return the splits of a folder written by ``save_to_disk``; a single dataset is the split ``train``."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}={folder}: `datasets` cannot load this folder: {error}.") from None
    return _splits(loaded, str(folder))


def hub_splits(name: str, subset: str | None, token: str | None, key: str) -> dict[str, Any]:
    """Return the splits of a hub dataset, from the local cache where the hub cannot be reached.

    Raises UserError, within seconds, for an unreachable hub, a dataset that is gated or absent, and a missing subset.
    """
    unreachable = _ask(name, token, key)
    from datasets import config, exceptions, load_dataset

    offline = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = offline or bool(unreachable)
    try:
        loaded = load_dataset(name, subset, token=token)
    except exceptions.DatasetNotFoundError as error:
        raise UserError(_refusal(name, key, str(error))) from None
    except ConnectionError as error:
        raise UserError(_unreachable(name, key, unreachable or str(error))) from None
    except ValueError as error:
        raise UserError(f"{key}={name}: {error} Set hf_name to one of its subsets.") from None
    finally:
        config.HF_HUB_OFFLINE = offline
    return _splits(loaded, name)


def _ask(name: str, token: str | None, key: str) -> str:
    """Return why the hub cannot be reached, or nothing. Raises UserError where it knows no such dataset."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi(token=token).dataset_info(name, timeout=_PATIENCE_SECONDS)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(_refusal(name, key, str(error).splitlines()[-1])) from None
    except Exception as error:
        # The transport's own exceptions differ between releases of huggingface_hub; the reason is passed on.
        return str(error)
    return ""


def _splits(loaded: Any, source: str) -> dict[str, Any]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {name: lambda name=name: HubRows(splits[name], f"{source} ({name})") for name in splits}


def _refusal(name: str, key: str, reason: str) -> str:
    return (
        f"{key}={name}: no such dataset on the hub, or one that is private or gated ({reason}). If it is gated, accept "
        f"its terms on https://huggingface.co/datasets/{name} and run `hf auth login`; if it is local, check the path."
    )


def _unreachable(name: str, key: str, reason: str) -> str:
    return (
        f"{key}={name}: no such file or folder here, and the hub cannot be reached for "
        f"https://huggingface.co/datasets/{name} ({reason}). Check the network, or give a local file or folder."
    )

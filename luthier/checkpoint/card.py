"""The README.md of a saved model: what it was trained from, on what, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

import luthier
from luthier.checkpoint.source import Source


def model_card(source: Source, command: str, dataset: str, keys: Mapping[str, Any]) -> str:
    """Return a model card in the hub's form: a YAML head, then the base model, the data set and the recipe's keys.

    ``keys`` are those to list, such as the ones that differ from their defaults; leave secrets out.
    """
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["luthier", command],
    }
    if source.hub_id:
        head["base_model"] = source.hub_id
    rows = "\n".join(f"| `{name}` | `{json.dumps(value, ensure_ascii=False)}` |" for name, value in keys.items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {source.name}, trained with `luthier {command}`\n\n"
        f"- Base model: `{source.name}`\n"
        f"- Data set: `{dataset}`\n"
        f"- Luthier {luthier.__version__}\n\n"
        f"| key | value |\n| --- | --- |\n{rows}\n"
    )


def converted_card(source: Source) -> str:
    """Return the card of a model that another layout, type or merged adapter is all that is new of."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if source.hub_id:
        head["base_model"] = source.hub_id
    merged = f", with the adapter `{source.adapter}` merged into it" if source.adapter else ""
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {source.name}\n\n"
        f"`{source.name}`{merged}, written by `luthier convert` {luthier.__version__}.\n"
    )

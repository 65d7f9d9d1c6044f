"""Model families, one file each, found by Hugging Face's ``model_type``.

A family module offers ``MODEL_TYPES`` and ``read(config)``, which makes a ``Decoder`` of a ``config.json``. A new
family is a new file here; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from luthier.errors import UserError, did_you_mean


def table() -> dict[str, ModuleType]:
    """Return {model_type: family module} for all families."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}


def find(config: Mapping[str, Any], place: str) -> ModuleType:
    """Return the family of a ``config.json``, read from ``place``.

    Raises UserError for a model type that no family knows.
    """
    known = table()
    model_type = str(config.get("model_type", ""))
    if model_type not in known:
        hint = did_you_mean(model_type, list(known))
        raise UserError(
            f"{place}: model type `{model_type or 'missing'}` is not supported.{hint} "
            f"Known: {', '.join(sorted(known))}. A new one is one file, luthier/model/families/NAME.py: see "
            "docs/adding-a-family.md."
        )
    return known[model_type]

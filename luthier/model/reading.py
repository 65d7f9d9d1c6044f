"""Reading a ``config.json`` field by field, each of the kind that it must be.

Left out on purpose: what the fields mean, which is a family's to know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import UserError

ORIGINAL = "Take the model's original config.json."
FULL, SLIDING = "full_attention", "sliding_attention"


class Fields:
    """The fields of a ``config.json``; one that is null is one that is left out.

    Every reader raises UserError where the value is of another kind, and KeyError where it is left out and no
    ``default`` is given.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {name: value for name, value in config.items() if value is not None}
        self.model_type = str(config.get("model_type", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value of any kind."""
        return self.config.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.config[name] if default is None else self.config.get(name, default)
        return self._kept(name, value, type(value) is int and value > 0, "a positive integer")

    def some(self, name: str) -> int | None:
        """Return a positive integer, or None where it is left out or 0."""
        return self.size(name) if self.config.get(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self.config[name] if default is None else self.config.get(name, default)
        return self._kept(name, value, type(value) in (int, float) and value > 0, "a positive number")

    def bound(self, name: str) -> float | None:
        """Return a positive number, or None where it is left out."""
        return None if self.config.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.config.get(name, default)
        return self._kept(name, value, type(value) is bool, "true or false")

    def choice(self, name: str, supported: Sequence[str], default: str) -> str:
        """Return one of the values that are supported."""
        value = self.config.get(name, default)
        if value not in supported:
            raise UserError(
                f"config.json: {name}=`{value}` is not supported for {self.model_type}; {' and '.join(supported)} is."
            )
        return value

    def divided(self, name: str, by: str, sizes: Mapping[str, int]) -> int:
        """Return one size over another, which must divide it."""
        if sizes[name] % sizes[by]:
            raise UserError(f"config.json: {name}={sizes[name]} is not a multiple of {by}={sizes[by]}. {ORIGINAL}")
        return sizes[name] // sizes[by]

    def heads(self) -> tuple[int, int, int]:
        """Return the numbers of query heads and of key and value heads, and the size of a head."""
        sizes = {"hidden_size": self.size("hidden_size"), "num_attention_heads": self.size("num_attention_heads")}
        sizes["num_key_value_heads"] = self.size("num_key_value_heads", sizes["num_attention_heads"])
        self.divided("num_attention_heads", "num_key_value_heads", sizes)
        width = self.some("head_dim") or self.divided("hidden_size", "num_attention_heads", sizes)
        if width % 2:
            raise UserError(f"config.json: head_dim={width} is odd; rotary positions turn pairs. {ORIGINAL}")
        return sizes["num_attention_heads"], sizes["num_key_value_heads"], width

    def layer_types(self, default: Sequence[str]) -> tuple[str, ...]:
        """Return whether each layer's attention is full or sliding: ``layer_types``, by default ``default``."""
        given = self.config.get("layer_types", default)
        count = self.size("num_hidden_layers")
        known = (FULL, SLIDING)
        if not isinstance(given, Sequence) or len(given) != count or any(kind not in known for kind in given):
            raise UserError(
                f"config.json: layer_types={json.dumps(given)} is not a list of {count} (num_hidden_layers) of "
                f"{' and '.join(known)}. {ORIGINAL}"
            )
        return tuple(given)

    def _kept(self, name: str, value: Any, right: bool, kind: str) -> Any:
        if not right:
            raise UserError(f"config.json: {name}={json.dumps(value)} is not {kind}. {ORIGINAL}")
        return value

"""Reading a ``config.json`` field by field, each of the kind that it must be.

Left out on purpose: what the fields mean, which is a family's to know.
"""

from __future__ import annotations

import json
import math
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

    def size(self, name: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.config[name] if default is None else self.config.get(name, default)
        return self._kept(name, value, type(value) is int and value > 0, "a positive integer")

    def count(self, name: str, default: int) -> int:
        """Return an integer that is not negative."""
        value = self.config.get(name, default)
        return self._kept(name, value, type(value) is int and value >= 0, "an integer of 0 or more")

    def some(self, name: str) -> int | None:
        """Return a positive integer, or None where it is left out or 0."""
        return self.count(name, 0) or None

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self.config[name] if default is None else self.config.get(name, default)
        return self._kept(name, value, _is_positive(value), "a positive number")

    def bound(self, name: str) -> float | None:
        """Return a positive number, or None where it is left out."""
        return self.number(name) if name in self.config else None

    def factor(self, name: str) -> float | None:
        """Return a positive number, or None where it is left out or 0."""
        value = self.config.get(name)
        return None if type(value) in (int, float) and value == 0 else self.bound(name)

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

    def integers(self, name: str, default: Sequence[int], count: int | None = None) -> tuple[int, ...]:
        """Return a list of integers, none of them negative, and ``count`` of them where that is given."""
        values = self.config.get(name, default)
        right = isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)
        kind = f"a list of {'' if count is None else f'{count} '}integers of 0 or more"
        return tuple(self._kept(name, values, right and count in (None, len(values)), kind))

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a list of positive numbers."""
        values = self.config[name]
        right = isinstance(values, list | tuple) and all(map(_is_positive, values))
        return tuple(float(value) for value in self._kept(name, values, right, "a list of positive numbers"))

    def group(self, name: str) -> dict[str, Any]:
        """Return the fields of an object but for those that are null, none where it is left out."""
        value = self.config.get(name, {})
        return Fields(self._kept(name, value, isinstance(value, Mapping), "an object")).config

    def text_config(self, supported: Sequence[str], usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields of a multimodal checkpoint's text tower, those that are null too, over ``usual`` ones.

        Raises UserError where the tower is of a model type that is not among ``supported``.
        """
        given = self.config["text_config"]
        text = {**(usual or {}), **self._kept("text_config", given, isinstance(given, Mapping), "an object")}
        if text.get("model_type") not in supported:
            raise UserError(
                f"config.json: text_config's model_type=`{text.get('model_type')}` is not supported for "
                f"{self.model_type}; {' and '.join(supported)} is."
            )
        return text

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


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf

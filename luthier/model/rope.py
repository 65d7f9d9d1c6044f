"""Rotary frequencies (RoFormer, arXiv 2104.09864) and their scaled forms.

Left out on purpose: applying them (``layers``), forms whose frequencies follow the length step by step ("dynamic"),
and positions of more than one axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import UserError
from luthier.model.reading import ORIGINAL, SLIDING, Fields

_LENGTH = "original_max_position_embeddings"
_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "longrope": ("factor", "attention_factor", _LENGTH),
    "proportional": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", _LENGTH),
}
ROPE_TYPES = tuple(_SETTINGS)


@dataclass(frozen=True)
class Rope:
    """Rotary settings under the names of ``config.json``; ``rope_type`` is one of ``ROPE_TYPES``.

    Of a head's numbers the first ``partial_rotary_factor`` are turned. Pair i is (i, i + half) of those, or, where
    ``interleaved``, (2 i, 2 i + 1). ``attention_factor`` None: what the type's paper says.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0
    interleaved: bool = False

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], kind: str | None = None, *, theta: float = 10_000.0, interleaved: bool = False
    ) -> Rope:
        """Read both places: ``rope_parameters`` (Transformers 5), and ``rope_theta`` with ``rope_scaling`` (before).

        With a ``kind``, such as "full_attention", read the settings of that kind of layer: from the kind's own entry,
        or, before Transformers 5, from ``rope_local_base_freq`` without scaling for layers that slide, and as for all
        layers for the others. ``theta`` is the base where none is given.

        Raises UserError where the type is unknown or a setting is of the wrong kind, KeyError where one is missing.
        """
        outer = Fields(config)
        given = _given(outer, kind)
        rope_type = _rope_type(given, outer.model_type)
        fields = Fields(given | _lengths(given, outer, rope_type))
        named = {name: fields.factor(name) for name in ("partial_rotary_factor", *_SETTINGS[rope_type])}
        settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if rope_type in ("linear", "llama3", "yarn"):
            settings["factor"] = fields.number("factor")
        if rope_type == "longrope":
            settings |= {name: fields.numbers(name) for name in ("short_factor", "long_factor")}
        if rope_type == "yarn":
            settings["truncate"] = fields.flag("truncate", True)
        return cls(fields.number("rope_theta", theta), rope_type, interleaved=interleaved, **settings)

    @property
    def table_factor(self) -> float:
        """What sines and cosines are multiplied by (arXiv 2309.00071, section 3.4; LongRoPE, arXiv 2402.13753)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "yarn":
            if self.mscale and self.mscale_all_dim:
                return self._stretch(self.mscale) / self._stretch(self.mscale_all_dim)
            return self._stretch(1.0)
        if self.rope_type == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        return 1.0

    @property
    def score_factor(self) -> float:
        """What DeepSeek's scores are multiplied by besides: the square of YaRN's stretch by ``mscale_all_dim``."""
        return self._stretch(self.mscale_all_dim) ** 2 if self.rope_type != "default" and self.mscale_all_dim else 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many numbers of a head are turned, an even number.

        Raises UserError where it is odd.
        """
        if self.rope_type == "proportional":
            return head_dim  # those beyond the part have frequency 0
        size = int(head_dim * self.partial_rotary_factor)
        if size % 2 or not 0 < size <= head_dim:
            raise UserError(
                f"config.json: partial_rotary_factor={self.partial_rotary_factor} of heads of {head_dim} numbers is "
                f"{size}; rotary positions turn pairs of them. {ORIGINAL}"
            )
        return size

    def _stretch(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def inverse_frequencies(rope: Rope, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Return the angle per position of each pair of a head's numbers, fp32 ``[rotary_dim / 2]``.

    "longrope" has two sets: those for rows that go beyond ``original_max_position_embeddings`` are returned with
    ``long``. The types follow what Transformers has under the same names in ``modeling_rope_utils``.

    Raises UserError where a list of factors has another length.
    """
    size = rope.rotary_dim(head_dim)
    steps = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (1.0 / np.float32(rope.rope_theta) ** steps).astype(np.float32)
    match rope.rope_type:
        case "linear":
            frequencies = frequencies / rope.factor
        case "llama3":
            frequencies = _llama3(rope, frequencies)
        case "yarn":
            frequencies = _yarn(rope, frequencies)
        case "longrope":
            frequencies = frequencies / _factors(rope, len(frequencies), long)
        case "proportional":
            turned = np.arange(size // 2) < int(rope.partial_rotary_factor * head_dim // 2)
            frequencies = np.where(turned, frequencies, 0) / rope.factor
    return frequencies.astype(np.float32)


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Return Llama 3.1's frequencies, as published with the model.

    Wavelengths over ``original / low_freq_factor`` are stretched by ``factor``, those under
    ``original / high_freq_factor`` kept, and the ones between interpolated.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blended(rope, frequencies, np.clip(smooth, 0.0, 1.0))


def _yarn(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Return YaRN's frequencies (Peng et al., arXiv 2309.00071, section 3.2).

    Pairs that turn more than ``beta_fast`` times over the original length are kept, those that turn less than
    ``beta_slow`` times stretched by ``factor``, and between them a straight line over the pair's number blends both.
    """
    size = 2 * len(frequencies)

    def pair(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = (last - first) or 0.001  # a step, where both are one pair
    kept = 1 - np.clip((np.arange(size // 2, dtype=np.float32) - first) / width, 0.0, 1.0)
    return _blended(rope, frequencies, kept)


def _blended(rope: Rope, frequencies: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return frequencies * (kept + (1 - kept) / rope.factor)


def _factors(rope: Rope, pairs: int, long: bool) -> np.ndarray:
    name = "long_factor" if long else "short_factor"
    factors = getattr(rope, name)
    if len(factors) != pairs:
        raise UserError(f"config.json: {name} has {len(factors)} numbers, heads have {pairs} turned pairs. {ORIGINAL}")
    return np.asarray(factors, np.float32)


def _given(config: Fields, kind: str | None) -> dict[str, Any]:
    """Return the settings of a kind of layer, with what stands beside them in ``config.json``."""
    given = config.group("rope_parameters") or config.group("rope_scaling")
    beside = {name: config.config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config.config}
    if kind in given or any(isinstance(value, Mapping) for value in given.values()):
        if kind is None or kind not in given:
            raise UserError(
                f"config.json: rope_parameters are those of {', '.join(given)}, and this model has layers of kind "
                f"`{kind or 'all'}`. {ORIGINAL}"
            )
        given = Fields(given).group(kind)
    elif kind == SLIDING and not config.group("rope_parameters"):
        base = config.bound("rope_local_base_freq")
        given = {} if base is None else {"rope_theta": base}
    return beside | given


def _rope_type(given: Mapping[str, Any], model_type: str) -> str:
    name = "rope_type" if "rope_type" in given else "type"
    rope_type = given.get(name, "default")
    if rope_type in ("su", "yarn") and "short_factor" in given:
        return "longrope"  # as Phi-3's first checkpoints call it
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"config.json: {name}=`{rope_type}` is not supported for model type `{model_type}`. "
            f"Supported: {', '.join(ROPE_TYPES)}."
        )
    return rope_type


def _lengths(given: Mapping[str, Any], config: Fields, rope_type: str) -> dict[str, Any]:
    """Return the original length, which may stand outside the settings, and the factor where it follows from that."""
    if _LENGTH not in _SETTINGS[rope_type]:
        return {}
    longest = config.some("max_position_embeddings")
    outer, own = config.some(_LENGTH), Fields(given).some(_LENGTH)
    original = outer or own
    if original is None or longest is None:
        length = original or longest
        return {} if length is None else {_LENGTH: length}
    follows = rope_type != "llama3" and "factor" not in given
    return {_LENGTH: original} | ({"factor": longest / original} if follows else {})

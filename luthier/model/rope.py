"""Rotary frequencies (RoFormer, arXiv 2104.09864) and their scaled forms.

Left out on purpose: applying them (``layers``), and forms that change with the length of the input ("dynamic").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary settings under the names of ``config.json``; ``rope_type`` is "default", "linear" or "llama3"."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Rope:
        """Read both places: ``rope_parameters`` (Transformers 5), and ``rope_theta`` with ``rope_scaling`` (before)."""
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise UserError(
                f"config.json: rope type `{kind}` is not supported for model type `{config.get('model_type')}`. "
                "Supported: default, linear, llama3."
            )
        theta = given.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return cls(theta, kind, **{name: given[name] for name in names if given.get(name) is not None})


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the angle per position of each pair of dimensions, fp32 ``[head_dim / 2]``.

    "llama3" follows Llama 3.1's published scaling (Transformers: ``_compute_llama3_parameters``): wavelengths over
    ``original / low_freq_factor`` are stretched by ``factor``, those under ``original / high_freq_factor`` kept, and
    the ones between interpolated.
    """
    frequencies = 1.0 / rope.rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.rope_type == "linear":
        return (frequencies / rope.factor).astype(np.float32)
    if rope.rope_type == "default":
        return frequencies.astype(np.float32)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (frequencies * (smooth + (1 - smooth) / rope.factor)).astype(np.float32)

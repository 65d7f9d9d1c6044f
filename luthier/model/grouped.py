"""Attention in which groups of query heads share a head of keys and values (Ainslie et al., arXiv 2305.13245).

Left out on purpose: keys and values that several layers share, and latent ones (``latent``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from luthier.model.attention import Needs, attention
from luthier.model.cache import Fresh, Line
from luthier.model.context import Here
from luthier.model.dense import biased
from luthier.model.layers import apply_rope
from luthier.model.norm import Norm
from luthier.model.param import Param, Part, Tree, declare
from luthier.model.rope import Rope


@dataclass(frozen=True)
class Grouped:
    """Attention of ``heads`` query heads over ``kv_heads``, each of ``head_dim`` numbers.

    ``rope`` None: positions are not told. ``window``, ``scale`` and ``softcap`` are those of ``attention``, and
    ``sinks`` says that heads have one. ``qk_norm`` is that of queries and keys before they are turned: each head's, or
    with ``whole_norm`` that of all heads together. ``growth`` (b, L) multiplies a query at position p by
    ``1 + b log(1 + floor(p / L))`` (Llama 4's temperature; Nakanishi, arXiv 2501.19399). ``joined`` says that one
    tensor, ``qkv_proj``, holds queries, keys and values. ``prefix`` is what the tensors' names begin with in a layer.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Norm | None = None
    whole_norm: bool = False
    growth: tuple[float, int] | None = None
    sinks: bool = False
    joined: bool = False
    prefix: str = "self_attn"

    @property
    def rope_dim(self) -> int:
        """How many numbers the heads have that ``rope`` is for."""
        return self.head_dim

    @property
    def needs(self) -> Needs:
        """What is asked of the kernel."""
        return Needs(self.head_dim, softcap=self.softcap is not None, sinks=self.sinks)

    @property
    def widths(self) -> int:
        """How many numbers the products with weights, and attention, make of a token."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim

    @property
    def scored(self) -> int:
        """How many numbers of a token's queries and outputs each key and value meet."""
        return 2 * self.heads * self.head_dim

    def spec(self, hidden_size: int, block: str) -> dict[str, Param]:
        """Declare the weights under the layer's prefix ``block``; o is stored output first, see ``dense``."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        weight = declare(sizes | {"embed": hidden_size, "norm": hidden_size})
        name = f"{block}{self.prefix}."
        spec = {"o": weight(f"{name}o_proj.weight", "d (n h) -> d n h", "embed", "heads", "head_dim")}
        for letter, heads, tensor, part in self._projections():
            spec[letter] = weight(f"{name}{tensor}.weight", "(n h) d -> d n h", "embed", heads, "head_dim", part=part)
            if self.qkv_bias:
                bias = weight(f"{name}{tensor}.bias", "(n h) -> n h", heads, "head_dim", init="zeros", part=part)
                spec[f"{letter}_bias"] = bias
            if self.qk_norm is not None and letter != "v":
                spec[f"{letter}_norm"] = self._norm_param(self.qk_norm, f"{name}{letter}_norm.weight", sizes[heads])
        if self.o_bias:
            spec["o_bias"] = weight(f"{name}o_proj.bias", "d -> d", "norm", init="zeros")
        if self.sinks:
            spec["sinks"] = weight(f"{name}sinks", "n -> n", "heads", init="zeros")
        return spec

    def line(self, layers: int) -> Line:
        """Declare what ``layers`` such layers keep of a token while sampling."""
        return Line(layers, self.kv_heads, self.head_dim, self.window)

    def apply(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, Fresh]:
        """Return ``[B, T, D]``, and the keys and values of these tokens."""
        q_BTNH = biased(here.dense("BTD,DNH->BTNH", x_BTD, p["q"]), p.get("q_bias"))
        k_BTKH = biased(here.dense("BTD,DKH->BTKH", x_BTD, p["k"]), p.get("k_bias"))
        v_BTKH = biased(here.dense("BTD,DKH->BTKH", x_BTD, p["v"]), p.get("v_bias"))
        if self.qk_norm is not None:
            q_BTNH, k_BTKH = self._normed(p["q_norm"], q_BTNH), self._normed(p["k_norm"], k_BTKH)
        if self.rope is not None:
            q_BTNH, k_BTKH = (apply_rope(x, here.ropes[self.rope]) for x in (q_BTNH, k_BTKH))
        if self.growth is not None:
            factor_BT = 1 + self.growth[0] * jnp.log1p((here.positions_BT // self.growth[1]).astype(jnp.float32))
            q_BTNH = (q_BTNH * factor_BT[..., None, None]).astype(q_BTNH.dtype)
        o_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            here.segments,
            implementation=here.compute.attention,
            scale=self.scale,
            window=self.window,
            past=here.past,
            context=here.context,
            gradient_dtype=here.compute.dtype,
            **self._extras(p),
        )
        out_BTD = here.dense("BTNH,DNH->BTD", o_BTNH, p["o"], out_dtype=here.compute.stream)
        return biased(out_BTD, p.get("o_bias")), Fresh(k_BTKH, v_BTKH)

    def _extras(self, p: Tree) -> dict[str, Any]:
        extras = {"softcap": self.softcap, "sinks_N": p.get("sinks")}
        return {name: value for name, value in extras.items() if value is not None}

    def _projections(self) -> list[tuple[str, str, str, Part | None]]:
        """Return (our name, axis of its heads, tensor, part of the tensor) of the three products."""
        if not self.joined:
            axes = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
            return [(letter, axis, f"{letter}_proj", None) for letter, axis in axes.items()]
        whole = self.heads + 2 * self.kv_heads
        starts = {"q": 0, "k": self.heads, "v": self.heads + self.kv_heads}
        return [
            (letter, "heads" if letter == "q" else "kv_heads", "qkv_proj", Part("n", start, whole))
            for letter, start in starts.items()
        ]

    def _norm_param(self, norm: Norm, tensor: str, heads: int) -> Param:
        return norm.param(tensor, self.head_dim * heads if self.whole_norm else self.head_dim)

    def _normed(self, scale: jax.Array, x_BTNH: jax.Array) -> jax.Array:
        assert self.qk_norm is not None
        if not self.whole_norm:
            return self.qk_norm.apply(scale, x_BTNH)
        return self.qk_norm.apply(scale, x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)

"""DeepSeek's multi-head latent attention: keys and values are made from one small vector a token (arXiv 2405.04434).

Without a past, each head's keys and values are written out, which costs the fewest operations. With one, queries are
taken into the space of the small vectors instead, and what attention gives is taken out of it: then a token's cache is
that vector and one key of positions, which all heads share (section 2.1.2 of the paper; "absorbed" weights).

Left out on purpose: choosing which tokens are looked at (DeepSeek-V3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from luthier import mesh
from luthier.model.attention import Needs, attention
from luthier.model.cache import Fresh, Line
from luthier.model.context import Here
from luthier.model.cpu import fence
from luthier.model.dense import biased, dora_factor, rounded, scaled
from luthier.model.layers import apply_rope
from luthier.model.lora import Lora
from luthier.model.norm import Norm
from luthier.model.param import Param, Part, Tree, declare
from luthier.model.quant import is_quantised
from luthier.model.rope import Rope

_UP = "BTC,CNH->BTNH"  # from a small vector to each head's keys or values


@dataclass(frozen=True)
class Latent:
    """Attention of ``heads`` heads over vectors of ``kv_rank`` numbers, in Hugging Face's ``config.json`` kv_lora_rank.

    A head's queries and keys are ``nope_dim`` numbers without positions and then ``rope_dim`` with, its values
    ``value_dim``. ``q_rank`` None: queries are made at once. ``bias`` says that o and the first products have one, and
    ``prefix`` is what the tensors' names begin with in a layer.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    bias: bool = False
    prefix: str = "self_attn"

    @property
    def norm(self) -> Norm:
        """The norm of both small vectors, whose epsilon ``config.json`` does not tell."""
        return Norm(1e-6)

    @property
    def head_dim(self) -> int:
        """How many numbers a head's queries and keys have."""
        return self.nope_dim + self.rope_dim

    @property
    def window(self) -> None:
        """All tokens are seen."""
        return None

    @property
    def needs(self) -> Needs:
        """What is asked of the kernel."""
        return Needs(self.head_dim, value_dim=self.value_dim)

    @property
    def widths(self) -> int:
        """How many numbers the products with weights, and attention, make of a token."""
        return 2 * self.heads * (self.head_dim + self.value_dim) + self.kv_rank + (self.q_rank or 0)

    @property
    def scored(self) -> int:
        """How many numbers of a token's queries and outputs each key and value meet."""
        return self.heads * (self.head_dim + self.value_dim)

    def spec(self, hidden_size: int, block: str) -> dict[str, Param]:
        """Declare the weights under the layer's prefix ``block``; o is stored output first, see ``dense``."""
        name = f"{block}{self.prefix}."
        spec = self._down("kv", f"{name}kv_a_proj_with_mqa", hidden_size, self.kv_rank + self.rope_dim)
        spec["kv_norm"] = self.norm.param(f"{name}kv_a_layernorm.weight", self.kv_rank)
        if self.q_rank is None:
            whole = declare({"embed": hidden_size, "heads": self.heads, "head_dim": self.head_dim})
            spec["q"] = whole(f"{name}q_proj.weight", "(n h) d -> d n h", "embed", "heads", "head_dim")
        else:
            spec |= self._down("q", f"{name}q_a_proj", hidden_size, self.q_rank)
            spec["q_norm"] = self.norm.param(f"{name}q_a_layernorm.weight", self.q_rank)
            spec["q"] = self._up(f"{name}q_b_proj", self.q_rank, self.head_dim)
        whole = self.nope_dim + self.value_dim
        spec["k_up"] = self._up(f"{name}kv_b_proj", self.kv_rank, self.nope_dim, Part("h", 0, whole))
        spec["v_up"] = self._up(f"{name}kv_b_proj", self.kv_rank, self.value_dim, Part("h", self.nope_dim, whole))
        out = declare({"embed": hidden_size, "norm": hidden_size, "heads": self.heads, "head_dim": self.value_dim})
        spec["o"] = out(f"{name}o_proj.weight", "d (n h) -> d n h", "embed", "heads", "head_dim")
        if self.bias:
            spec["o_bias"] = out(f"{name}o_proj.bias", "d -> d", "norm", init="zeros")
        return spec

    def line(self, layers: int) -> Line:
        """Declare what ``layers`` such layers keep of a token while sampling: one key, which begins with its value."""
        return Line(layers, 1, self.kv_rank + self.rope_dim, values=0)

    def apply(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, Fresh]:
        """Return ``[B, T, D]``, and what is to be kept of these tokens."""
        q_BTNH = self._queries(p, x_BTD, here)
        c_BTC, k_BT1R = self._compressed(p, x_BTD, here)
        key_BT1E = jnp.concatenate([c_BTC[:, :, None], k_BT1R], axis=-1)
        attend = self._expanded if here.past is None else self._absorbed
        o_BTNH = attend(p, q_BTNH, key_BT1E, here)
        out_BTD = here.dense("BTNH,DNH->BTD", o_BTNH, p["o"], out_dtype=here.compute.stream)
        return biased(out_BTD, p.get("o_bias")), Fresh(key_BT1E, None)

    def _queries(self, p: Tree, x_BTD: jax.Array, here: Here) -> jax.Array:
        if self.q_rank is not None:
            x_BTD = biased(here.dense("BTD,DC->BTC", x_BTD, p["q_down"]), p.get("q_down_bias"))
            x_BTD = self.norm.apply(p["q_norm"], x_BTD)
        q_BTNH = here.dense("BTD,DNH->BTNH", x_BTD, p["q"])
        return apply_rope(q_BTNH, here.ropes[self.rope].at_the_end_of(self.head_dim))

    def _compressed(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, jax.Array]:
        """Return the small vectors ``[B, T, C]``, and the keys of positions ``[B, T, 1, R]``."""
        kv_BTE = biased(here.dense("BTD,DE->BTE", x_BTD, p["kv_down"]), p.get("kv_down_bias"))
        c_BTC, k_BTR = fence(kv_BTE[..., : self.kv_rank]), fence(kv_BTE[..., self.kv_rank :])
        return self.norm.apply(p["kv_norm"], c_BTC), apply_rope(k_BTR[:, :, None], here.ropes[self.rope])

    def _expanded(self, p: Tree, q_BTNH: jax.Array, key_BT1E: jax.Array, here: Here) -> jax.Array:
        """Return ``[B, T, N, value_dim]`` by each head's own keys and values."""
        c_BTC, k_BT1R = key_BT1E[:, :, 0, : self.kv_rank], key_BT1E[..., self.kv_rank :]
        k_BTNH = here.dense(_UP, c_BTC, p["k_up"])
        v_BTNH = here.dense(_UP, c_BTC, p["v_up"])
        shared_BTNR = jnp.broadcast_to(k_BT1R, (*k_BTNH.shape[:3], self.rope_dim))
        return self._attention(q_BTNH, jnp.concatenate([k_BTNH, shared_BTNR], axis=-1), v_BTNH, here)

    def _absorbed(self, p: Tree, q_BTNH: jax.Array, key_BT1E: jax.Array, here: Here) -> jax.Array:
        """Return ``[B, T, N, value_dim]`` by attention to the small vectors themselves."""
        nope_BTNH, turned_BTNR = q_BTNH[..., : self.nope_dim], q_BTNH[..., self.nope_dim :]
        q_BTNC = _into_latent(nope_BTNH, p["k_up"], here.compute.dtype)
        q_BTNE = jnp.concatenate([q_BTNC, turned_BTNR], axis=-1)
        o_BTNC = self._attention(q_BTNE, key_BT1E, key_BT1E[..., : self.kv_rank], here)
        return _out_of_latent(o_BTNC, p["v_up"], here.compute.dtype)

    def _attention(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, here: Here) -> jax.Array:
        scale = self.head_dim**-0.5 * self.rope.score_factor
        how = {"implementation": here.compute.attention, "past": here.past, "context": here.context}
        how |= {"scale": scale, "gradient_dtype": here.compute.dtype}
        return attention(q_BTNH, k_BTKH, v_BTKH, here.segments, **how)

    def _down(self, letters: str, tensor: str, hidden_size: int, size: int) -> dict[str, Param]:
        """Declare a first product, from the model's width to a small vector, and its bias."""
        weight = declare({"embed": hidden_size, "norm": size})
        spec = {f"{letters}_down": weight(f"{tensor}.weight", "c d -> d c", "embed", "norm")}
        if self.bias:
            spec[f"{letters}_down_bias"] = weight(f"{tensor}.bias", "c -> c", "norm", init="zeros")
        return spec

    def _up(self, tensor: str, rank: int, size: int, part: Part | None = None) -> Param:
        """Declare a product from ``rank`` numbers to ``size`` of each head."""
        weight = declare({"latent": rank, "heads": self.heads, "head_dim": size})
        return weight(f"{tensor}.weight", "(n h) c -> c n h", "latent", "heads", "head_dim", part=part)


def _into_latent(x_BTNH: jax.Array, w: Any, dtype: Any) -> jax.Array:
    """Return the product of each head's numbers with the transpose of its part of a weight, ``[B, T, N, C]``."""
    if not isinstance(w, Lora):
        return _per_head("BTNH,CNH->BTNC", x_BTNH, w, dtype)
    if w.magnitude is not None:
        x_BTNH = x_BTNH * _per_row(dora_factor(_UP, w), x_BTNH)
    b_NHR = w.b.reshape(*x_BTNH.shape[2:], -1)
    inner_BTNR = scaled(_per_head("BTNH,NHR->BTNR", x_BTNH, b_NHR, dtype), w)
    return _into_latent(x_BTNH, w.base, dtype) + _per_head("BTNR,RC->BTNC", inner_BTNR, w.a, dtype)


def _out_of_latent(x_BTNC: jax.Array, w: Any, dtype: Any) -> jax.Array:
    """Return the product of each head's numbers with its part of a weight, ``[B, T, N, H]``."""
    if not isinstance(w, Lora):
        return _per_head("BTNC,CNH->BTNH", x_BTNC, w, dtype)
    y_BTNH = _out_of_latent(x_BTNC, w.base, dtype)
    inner_BTNR = scaled(_per_head("BTNC,RC->BTNR", x_BTNC, w.a, dtype), w)
    y_BTNH = y_BTNH + _per_head("BTNR,NHR->BTNH", inner_BTNR, w.b.reshape(*y_BTNH.shape[2:], -1), dtype)
    return y_BTNH if w.magnitude is None else y_BTNH * _per_row(dora_factor(_UP, w), y_BTNH)


def _per_row(factor_O: jax.Array, x_BTNH: jax.Array) -> jax.Array:
    return factor_O.reshape(x_BTNH.shape[2:]).astype(x_BTNH.dtype)


def _per_head(einsum: str, x: jax.Array, w: Any, dtype: Any) -> jax.Array:
    """Return the product of each head with its own part of a weight, in the type of ``x``, summed in fp32.

    The weight, an array or quantised, is rounded to ``dtype`` as in ``dense``, whatever the type of ``x``.
    """
    floats = rounded(w.materialised(dtype) if is_quantised(w) else w, dtype)
    # XLA's CPU compiler has no kernel for batches of bf16 products where it computes one side itself.
    computed = jnp.float32 if mesh.platform() == "cpu" else x.dtype
    operands = x.astype(computed), floats.astype(computed)
    return jnp.einsum(einsum, *operands, preferred_element_type=jnp.float32).astype(x.dtype)

"""The gated feed-forward block of a dense layer (Shazeer, arXiv 2002.05202).

Left out on purpose: blocks without a gate, which no family here has.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from luthier.model.context import Here
from luthier.model.dense import biased, dense
from luthier.model.layers import gated
from luthier.model.param import Param, Part, Tree, declare


@dataclass(frozen=True)
class Mlp:
    """A feed-forward block of ``size`` inner numbers.

    ``activation`` is that of the gate: "silu" or "gelu_tanh". ``joined`` says that one tensor, ``gate_up_proj``, holds
    the gate's rows and then the other's. ``prefix`` is what the tensors' names begin with in a layer.
    """

    size: int
    activation: str = "silu"
    bias: bool = False
    joined: bool = False
    prefix: str = "mlp"

    @property
    def top_k(self) -> int:
        """Every token goes the same way."""
        return 0

    @property
    def widths(self) -> int:
        """How many numbers the products with weights make of a token, the last one's left out."""
        return 2 * self.size

    def spec(self, hidden_size: int, block: str) -> dict[str, Param]:
        """Declare the weights under the layer's prefix ``block``; down is stored output first, see ``dense``."""
        weight = declare({"embed": hidden_size, "norm": hidden_size, "mlp": self.size})
        names = {name: f"{block}{self.prefix}.{name}_proj" for name in ("gate", "up", "down")}
        parts: dict[str, Any] = {"gate": None, "up": None}
        if self.joined:
            names |= dict.fromkeys(("gate", "up"), f"{block}{self.prefix}.gate_up_proj")
            parts = {"gate": Part("f", 0, 2 * self.size), "up": Part("f", self.size, 2 * self.size)}
        spec = {
            "gate": weight(f"{names['gate']}.weight", "f d -> d f", "embed", "mlp", part=parts["gate"]),
            "up": weight(f"{names['up']}.weight", "f d -> d f", "embed", "mlp", part=parts["up"]),
            "down": weight(f"{names['down']}.weight", "d f -> d f", "embed", "mlp"),
        }
        if self.bias:
            spec |= {
                "gate_bias": weight(f"{names['gate']}.bias", "f -> f", "mlp", init="zeros", part=parts["gate"]),
                "up_bias": weight(f"{names['up']}.bias", "f -> f", "mlp", init="zeros", part=parts["up"]),
                "down_bias": weight(f"{names['down']}.bias", "d -> d", "norm", init="zeros"),
            }
        return spec

    def apply(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, None]:
        """Return ``[B, T, D]``; nothing is routed."""
        inner = here.compute.inner
        keep = inner == x_BTD.dtype  # else `gated` does, in the type of `x`
        product = functools.partial(dense, "BTD,DF->BTF", x_BTD, out_dtype=inner, keep=keep)
        gate_BTF = biased(product(p["gate"]), p.get("gate_bias"))
        up_BTF = biased(product(p["up"]), p.get("up_bias"))
        inner_BTF = gated(self.activation, gate_BTF, up_BTF, x_BTD.dtype)
        out_BTD = dense("BTF,DF->BTD", inner_BTF, p["down"], out_dtype=here.compute.stream)
        return biased(out_BTD, p.get("down_bias")), None

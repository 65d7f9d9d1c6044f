"""A mixture of experts: each token goes through a few of many feed-forward blocks, and through the shared ones.

Every token goes where it is sent, however many go there. Padding goes to no expert.

Left out on purpose: capacities and dropping; moving the correction bias while training (arXiv 2408.15664).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from luthier import mesh as mesh_lib
from luthier.model import dispatch, router, zigzag
from luthier.model.context import Here
from luthier.model.experts import grouped
from luthier.model.layers import gated
from luthier.model.lora import Lora
from luthier.model.mlp import Mlp
from luthier.model.param import Param, Part, Tree, declare, stacked
from luthier.model.quant import Blockwise, is_quantised, unnested
from luthier.model.router import Routed, Routing

# How an expert's weights lie on the mesh while they are used: whole along `fsdp`.
_SPECS = {
    "gate": P("expert", None, "tensor"),
    "up": P("expert", None, "tensor"),
    "down": P("expert", "tensor", None),
    "gate_bias": P("expert", "tensor"),
    "up_bias": P("expert", "tensor"),
    "down_bias": P("expert", None),
}


@dataclass(frozen=True)
class Clamp:
    """gpt-oss's gate: ``(up + 1) * gate * sigmoid(alpha * gate)``, of values that ``limit`` bounds."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, kw_only=True)
class Moe(Routing):
    """Experts of ``size`` inner numbers, and how tokens reach them.

    ``clamp`` replaces the gate's ``activation``. ``shared`` works on every token. Tensors are named
    ``{prefix}.{router}`` and, by ``names`` for gate, up and down, ``{prefix}.experts.{number}.{name}``; where they are
    ``fused``, as in gpt-oss, the experts are an axis of one tensor of each kind, input first, with biases, and the
    columns of gate and up alternate.
    """

    size: int
    activation: str = "silu"
    clamp: Clamp | None = None
    shared: Mlp | None = None
    fused: bool = False
    prefix: str = "mlp"
    router: str = "gate"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    @property
    def widths(self) -> int:
        """How many numbers the products with weights make of a token, the last one's left out."""
        return self.experts + 2 * self.top_k * self.size + (0 if self.shared is None else self.shared.widths)

    def spec(self, hidden_size: int, block: str) -> dict[str, Any]:
        """Declare the weights under the layer's prefix ``block``; all of the experts' are stored input first."""
        own = block + self.prefix
        weight = declare({"embed": hidden_size, "router": self.experts})
        spec: dict[str, Any] = {"router": weight(f"{own}.{self.router}.weight", "e d -> e d", "router", "embed")}
        if self.router_bias:
            spec["router_bias"] = weight(f"{own}.{self.router}.bias", "e -> e", "router", init="zeros")
        if self.correction:
            name = f"{own}.{self.router}.e_score_correction_bias"
            # In bf16 it would choose other experts; Transformers keeps it in fp32 too.
            spec["correction"] = weight(name, "e -> e", "router", init="zeros", exact=True)
        spec |= self._fused_spec(hidden_size, own) if self.fused else self._split_spec(hidden_size, own)
        if self.shared is not None:
            spec["shared"] = self.shared.spec(hidden_size, block)
        return spec

    def _split_spec(self, hidden_size: int, own: str) -> dict[str, Param]:
        weight = declare({"expert_embed": hidden_size, "expert_mlp": self.size})
        gate, up, down = (f"{own}.experts.{{expert}}.{name}.weight" for name in self.names)
        spec = {
            "gate": weight(gate, "f d -> d f", "expert_embed", "expert_mlp"),
            "up": weight(up, "f d -> d f", "expert_embed", "expert_mlp"),
            "down": weight(down, "d f -> f d", "expert_mlp", "expert_embed"),
        }
        return stacked(spec, "expert", range(self.experts))

    def _fused_spec(self, hidden_size: int, own: str) -> dict[str, Param]:
        sizes = {"norm": hidden_size, "expert_embed": hidden_size, "expert_mlp": self.size}
        weight = declare(sizes | {"expert": self.experts})
        spec = {
            "down": weight(f"{own}.experts.down_proj", "e f d -> e f d", "expert", "expert_mlp", "expert_embed"),
            "down_bias": weight(f"{own}.experts.down_proj_bias", "e d -> e d", "expert", "norm", init="zeros"),
        }
        both = f"{own}.experts.gate_up_proj"
        for place, name in enumerate(("gate", "up")):
            part = Part("f", place, 2 * self.size, step=2)
            spec[name] = weight(both, "e d f -> e d f", "expert", "expert_embed", "expert_mlp", part=part)
            spec[f"{name}_bias"] = weight(f"{both}_bias", "e f -> e f", "expert", "expert_mlp", init="zeros", part=part)
        return spec

    def apply(self, p: Tree, x_BTD: jax.Array, here: Here) -> tuple[jax.Array, Routed]:
        """Return ``[B, T, D]``, and where its tokens were sent."""
        real_BT = router.real_tokens(here.segments)
        with jax.named_scope("router"):
            logits_BTE = router.router_logits(x_BTD, p["router"], p.get("router_bias"))
            weights_BTk, chosen_BTk = router.route(self, logits_BTE, p.get("correction"), here.routes_BTk)
            routed = router.routed(self, logits_BTE, chosen_BTk, real_BT)
        if real_BT is not None:
            chosen_BTk = jnp.where(real_BT[..., None], chosen_BTk, self.experts)
        with jax.named_scope("experts"):
            weights = {name: p[name] for name in _SPECS if name in p}
            out_BTD = self._over_mesh(weights, x_BTD, chosen_BTk, weights_BTk, here.context is not None)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                shared_BTD, _ = self.shared.apply(p["shared"], x_BTD, here)
                out_BTD = out_BTD + shared_BTD
        return out_BTD, routed

    def _over_mesh(
        self, p: Tree, x_BTD: jax.Array, chosen_BTk: jax.Array, weights_BTk: jax.Array, by_time: bool
    ) -> jax.Array:
        """Run the experts on each device: its own experts, and its part of their inner numbers.

        ``by_time``: rows are split over the mesh's ``context`` axis too.
        """
        mesh = mesh_lib.current()
        if mesh is None or mesh.size == 1:
            return self._on_device(dispatch.locally, (), p, x_BTD, chosen_BTk, weights_BTk)
        split = x_BTD.shape[0] % mesh_lib.batch_shards(mesh) == 0
        summed = tuple(axis for axis in ("tensor", *(() if split else ("expert",))) if mesh.shape[axis] > 1)
        if mesh.shape["expert"] == 1:
            way = dispatch.locally
        elif not split:
            way = dispatch.here
        else:
            way = dispatch.gathered if mesh_lib.platform() == "cpu" else dispatch.exchanged
        rows = P(mesh_lib.BATCH_AXES if split else None, zigzag.AXIS if by_time else None)
        # Sums over devices are written out: there is no replication for check_vma to verify.
        p = jax.tree.map(functools.partial(_in_blocks, mesh.shape["tensor"]), p, is_leaf=is_quantised)
        specs = {name: _placed(weight, _SPECS[name]) for name, weight in p.items()}
        return jax.shard_map(
            functools.partial(self._on_device, way, summed),
            mesh=mesh,
            in_specs=(specs, rows, rows, rows),
            out_specs=rows,
            check_vma=False,
        )(p, x_BTD, chosen_BTk, weights_BTk)

    def _on_device(
        self, way: Any, summed: tuple[str, ...], p: Tree, x_BTD: jax.Array, chosen_BTk: jax.Array, weights_BTk: Any
    ) -> jax.Array:
        """Return the experts' output ``[B, T, D]``, summed over the mesh axes ``summed``."""
        tensor = jax.lax.axis_size("tensor") if "tensor" in summed else 1
        flat = (array.reshape(-1, array.shape[-1]) for array in (x_BTD, chosen_BTk, weights_BTk))
        experts = len(jax.tree.leaves(p["gate"])[0])
        out_MD = way(functools.partial(self._feed, p, tensor), experts, *flat).astype(x_BTD.dtype)
        return (jax.lax.psum(out_MD, summed) if summed else out_MD).reshape(x_BTD.shape)

    def _feed(self, p: Tree, tensor: int, x_RD: jax.Array, sizes_E: jax.Array, experts_R: jax.Array) -> jax.Array:
        """Return what each row's expert makes of it, less what other devices of the ``tensor`` axis add."""
        gate_RF = _biased(grouped(x_RD, p["gate"], sizes_E), p.get("gate_bias"), experts_R)
        up_RF = _biased(grouped(x_RD, p["up"], sizes_E), p.get("up_bias"), experts_R)
        inner_RF = gated(self.activation, gate_RF, up_RF) if self.clamp is None else clamped(self.clamp, gate_RF, up_RF)
        bias_ED = p["down_bias"] / tensor if "down_bias" in p else None  # each device adds its share of it
        return _biased(grouped(inner_RF, p["down"], sizes_E), bias_ED, experts_R)


def clamped(clamp: Clamp, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return gpt-oss's gated activation (arXiv 2508.10925, section 2.2) in the type of ``gate``, computed in fp32."""
    gate32 = jnp.minimum(gate.astype(jnp.float32), clamp.limit)
    up32 = jnp.clip(up.astype(jnp.float32), -clamp.limit, clamp.limit)
    return ((up32 + 1) * gate32 * jax.nn.sigmoid(clamp.alpha * gate32)).astype(gate.dtype)


def _placed(weight: Any, placed: P) -> Any:
    """Return how the fields of an experts' weight lie on the mesh, given how the array ``[E, I, O]`` does."""
    if isinstance(weight, Lora):
        expert, into, out = placed
        base = _placed(weight.base, placed)
        return replace(weight, base=base, a=P(expert, None, into), b=P(expert, out, None))
    if is_quantised(weight):
        expert, into, out = placed
        return jax.tree.map(lambda field: P(expert, out, into) if field.ndim == 3 else P(expert, out), weight)
    return placed


def _in_blocks(ways: int, weight: Any) -> Any:
    """Return a weight whose fields can be cut ``ways`` times by rows or columns: a quantised one's blocks are halved
    until they can.
    """
    weight = unnested(weight)
    if not isinstance(weight, Blockwise):
        return weight
    halves = ways // math.gcd(ways, weight.scales.shape[-1])
    return replace(weight, scales=jnp.repeat(weight.scales, halves, axis=-1))


def _biased(y_RO: jax.Array, bias_EO: jax.Array | None, experts_R: jax.Array) -> jax.Array:
    """Add each row's expert's bias; the gradient of the bias is summed in its own type."""
    return y_RO if bias_EO is None else y_RO + bias_EO.at[experts_R].get(mode="clip").astype(y_RO.dtype)

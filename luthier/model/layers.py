"""The small layers between matmuls, and what a layer's backward pass recomputes.

The norm and the gates save only their inputs and compute in fp32 inside, so their intermediates never reach memory
between the passes. Left out on purpose: norms and activations that no family here uses; of rotary positions, tables
that change within a row (see ``rope_tables``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from luthier import mesh
from luthier.model.cpu import fence
from luthier.model.rope import Rope, inverse_frequencies

# Names given to values inside `dense` and `attention`: matmul outputs, and what attention's gradient needs.
SAVED = ("dense", "attention")


def remat(policy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator for the body of a scan over layers.

    ``none`` saves whatever autodiff asks for; ``full`` saves a layer's input alone and runs the layer again in the
    backward pass; ``dots`` also saves the outputs of matmuls and of attention that gradients need, so that only norms,
    activations and layout changes are run again.
    """
    if policy == "none":
        return lambda body: body
    saved = jax.checkpoint_policies.save_only_these_names(*(SAVED if policy == "dots" else ()))
    return functools.partial(jax.checkpoint, policy=saved, prevent_cse=False)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Return ``x`` over its root mean square on the last axis, times ``scale_D``, in the type of ``x``.

    Formula: Zhang and Sennrich, arXiv 1910.07467.
    """
    return _differentiable_rms_norm(x, scale_D, eps)


def _rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * _inverse_rms(x32, eps) * scale_D.astype(jnp.float32)).astype(x.dtype)


def _inverse_rms(x32: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    return _rms_norm(x, scale_D, eps), (x, scale_D)


def _rms_norm_backward(eps: float, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale_D = saved
    x32, dy32 = x.astype(jnp.float32), dy.astype(jnp.float32)
    inverse = _inverse_rms(x32, eps)
    unit = x32 * inverse
    dunit = dy32 * scale_D.astype(jnp.float32)
    dx = inverse * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True))
    dscale_D = jnp.sum(dy32 * unit, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale_D.astype(scale_D.dtype)


_differentiable_rms_norm = jax.custom_vjp(_rms_norm, nondiff_argnums=(2,))
_differentiable_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def gated(activation: str, gate: jax.Array, up: jax.Array, dtype: Any = None) -> jax.Array:
    """Return ``activation(gate) * up`` in ``dtype`` (default: that of ``gate``); Shazeer, arXiv 2002.05202.

    ``activation`` is "silu", or "gelu_tanh" (by tanh, as Hendrycks and Gimpel's arXiv 1606.08415 approximates it).
    The backward pass finds ``gate`` and ``up`` saved in ``dtype``.
    """
    return _gated(activation, gate.dtype, jnp.dtype(dtype or gate.dtype), gate, up)


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return silu and its slope."""
    sigmoid = jax.nn.sigmoid(x)
    silu = x * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


def _gelu_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return gelu by its tanh approximation, and its slope."""
    outer, inner = math.sqrt(2 / math.pi), 0.044715
    square = jnp.square(x)
    tanh = jnp.tanh(outer * x * (1 + inner * square))
    slope = (1 + tanh) / 2 + x / 2 * (1 - jnp.square(tanh)) * outer * (1 + 3 * inner * square)
    return x * (1 + tanh) / 2, slope


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gated(activation: str, own: Any, dtype: Any, gate: jax.Array, up: jax.Array) -> jax.Array:
    value, _ = _ACTIVATIONS[activation](gate.astype(jnp.float32))
    return (value * up.astype(jnp.float32)).astype(dtype)


def _gated_forward(activation: str, own: Any, dtype: Any, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    saved = (gate, up)
    if own != dtype:  # the shorter form is the one that "dots" is to save
        saved = tuple(checkpoint_name(x.astype(dtype), "dense") for x in saved)
    return _gated(activation, own, dtype, gate, up), saved


def _gated_backward(activation: str, own: Any, dtype: Any, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    gate32, up32, dy32 = (array.astype(jnp.float32) for array in (gate, up, dy))
    value, slope = _ACTIVATIONS[activation](gate32)
    return (dy32 * up32 * slope).astype(own), (dy32 * value).astype(own)


_gated.defvjp(_gated_forward, _gated_backward)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return ``x`` bent to stay within ``cap`` of 0 (Gemma 2, arXiv 2408.00118), in fp32; None leaves it as it is."""
    if cap is None:
        return x
    return (jnp.tanh(x.astype(jnp.float32) / cap) * cap).astype(x.dtype)


class Turned(NamedTuple):
    """Which numbers of a head are turned: ``size`` from ``start`` on, in pairs (i, i + half) or next to each other."""

    start: int
    size: int
    interleaved: bool

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in a head of each pair's first and second number."""
        numbers = np.arange(self.start, self.start + self.size)
        first, second = numbers.reshape(-1, 2).T if self.interleaved else numbers.reshape(2, -1)
        return first, second


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotation:
    """How positions turn a head: (cos, sin), each fp32 ``[B, T, H]``, 1 and 0 for what is not turned."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array
    turned: Turned = field(metadata={"static": True})

    def at_the_end_of(self, head_dim: int) -> Rotation:
        """Return the rotation of wider heads, whose last numbers are turned as these are."""
        more = head_dim - self.cos_BTH.shape[-1]
        before = ((0, 0), (0, 0), (more, 0))
        # Fenced, so that a CPU pads them once and not for every head.
        cos_BTH = fence(jnp.pad(self.cos_BTH, before, constant_values=1.0))
        sin_BTH = fence(jnp.pad(self.sin_BTH, before))
        return Rotation(cos_BTH, sin_BTH, self.turned._replace(start=self.turned.start + more))


def rope_tables(positions_BT: jax.Array, rope: Rope, head_dim: int) -> Rotation:
    """Return how each position turns a head of ``head_dim`` numbers.

    Where ``rope`` has other frequencies for long texts, a row's greatest position decides on all of the row, so that
    no row's result depends on what else is in its batch. What a cache already holds stays as it was.
    """
    turned = Turned(0, rope.rotary_dim(head_dim), rope.interleaved)
    positions_BT1 = positions_BT[..., None].astype(jnp.float32)
    frequencies: Any = _per_number(turned, inverse_frequencies(rope, head_dim))
    if rope.rope_type == "longrope":
        long = _per_number(turned, inverse_frequencies(rope, head_dim, long=True))
        beyond_B = jnp.max(positions_BT, axis=1) >= rope.original_max_position_embeddings
        frequencies = jnp.where(beyond_B[:, None, None], long, frequencies)
    angles = positions_BT1 * frequencies
    cos_BTR, sin_BTR = jnp.cos(angles), jnp.sin(angles)
    if rope.table_factor != 1.0:
        cos_BTR, sin_BTR = cos_BTR * rope.table_factor, sin_BTR * rope.table_factor
    after = ((0, 0), (0, 0), (0, head_dim - turned.size))
    if turned.size != head_dim:
        cos_BTR, sin_BTR = jnp.pad(cos_BTR, after, constant_values=1.0), jnp.pad(sin_BTR, after)
    return Rotation(cos_BTR, sin_BTR, turned)


def _per_number(turned: Turned, frequencies: np.ndarray) -> np.ndarray:
    return np.repeat(frequencies, 2) if turned.interleaved else np.concatenate([frequencies, frequencies])


def apply_rope(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the pairs of each head's numbers by the head's position.

    Formula: Su et al., arXiv 2104.09864.
    """
    return _rotate(rotation.turned, x_BTNH, rotation.cos_BTH, rotation.sin_BTH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(turned: Turned, x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    quarter = _quarter_turn(turned, x_BTNH).astype(jnp.float32)
    rotated = x_BTNH.astype(jnp.float32) * cos_BTH[:, :, None] + quarter * sin_BTH[:, :, None]
    return fence(rotated.astype(x_BTNH.dtype))


def _rotate_forward(turned: Turned, x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> tuple[jax.Array, Any]:
    return _rotate(turned, x_BTNH, cos_BTH, sin_BTH), (cos_BTH, sin_BTH)


def _rotate_backward(turned: Turned, saved: Any, dy_BTNH: jax.Array) -> tuple[jax.Array, None, None]:
    cos_BTH, sin_BTH = saved
    # A rotation's transpose turns the other way.
    return _rotate(turned, fence(dy_BTNH), cos_BTH, -sin_BTH), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _quarter_turn(turned: Turned, x_BTNH: jax.Array) -> jax.Array:
    """Return (-second, first) in the places of each (first, second) pair, and 0 in those of no pair."""
    width = x_BTNH.shape[-1]
    if mesh.platform() == "cpu":
        # On a CPU, slices of the innermost axis spoil the fusions around them; a product with a constant does not, and
        # is as exact.
        first, second = turned.pairs()
        turn_HH = np.zeros((width, width))
        turn_HH[first, second], turn_HH[second, first] = 1, -1
        return jax.lax.dot(x_BTNH.reshape(-1, width), jnp.asarray(turn_HH, x_BTNH.dtype)).reshape(x_BTNH.shape)
    start, size, interleaved = turned
    x_BTNR = x_BTNH[..., start : start + size]
    if interleaved:
        x_BTNP2 = x_BTNR.reshape(*x_BTNR.shape[:-1], size // 2, 2)
        quarter_BTNR = jnp.stack([-x_BTNP2[..., 1], x_BTNP2[..., 0]], axis=-1).reshape(x_BTNR.shape)
    else:
        quarter_BTNR = jnp.concatenate([-x_BTNR[..., size // 2 :], x_BTNR[..., : size // 2]], axis=-1)
    return jnp.pad(quarter_BTNR, ((0, 0), (0, 0), (0, 0), (start, width - start - size)))

"""The small layers between matmuls, and what a layer's backward pass recomputes.

The norm and the gate save only their inputs and compute in fp32 inside, so their intermediates never reach memory
between the passes. Left out on purpose: norms and activations that no family here uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from luthier import mesh
from luthier.model.cpu import fence

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


@jax.custom_vjp
def silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return ``silu(gate) * up`` in the type of ``gate`` (SwiGLU: Shazeer, arXiv 2002.05202)."""
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)


def _silu_gate_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    return silu_gate(gate, up), (gate, up)


def _silu_gate_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    gate32, up32, dy32 = (array.astype(jnp.float32) for array in (gate, up, dy))
    sigmoid = jax.nn.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = dy32 * up32 * (sigmoid + silu * (1 - sigmoid))
    return dgate.astype(gate.dtype), (dy32 * silu).astype(up.dtype)


silu_gate.defvjp(_silu_gate_forward, _silu_gate_backward)


def rope_tables(positions_BT: jax.Array, frequencies: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return (cos, sin), each fp32 ``[B, T, H]``, of positions times the ``H / 2`` frequencies, which appear twice."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.concatenate([frequencies, frequencies])
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each head by its position: dimension i is paired with i + H/2, as in Hugging Face's Llama.

    Formula: Su et al., arXiv 2104.09864.
    """
    cos_BTH, sin_BTH = tables
    return _rotate(x_BTNH, cos_BTH, sin_BTH)


@jax.custom_vjp
def _rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    turned = _quarter_turn(x_BTNH).astype(jnp.float32)
    rotated = x_BTNH.astype(jnp.float32) * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]
    return fence(rotated.astype(x_BTNH.dtype))


def _rotate_forward(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> tuple[jax.Array, Any]:
    return _rotate(x_BTNH, cos_BTH, sin_BTH), (cos_BTH, sin_BTH)


def _rotate_backward(saved: Any, dy_BTNH: jax.Array) -> tuple[jax.Array, None, None]:
    cos_BTH, sin_BTH = saved
    return _rotate(fence(dy_BTNH), cos_BTH, -sin_BTH), None, None  # a rotation's transpose turns the other way


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _quarter_turn(x_BTNH: jax.Array) -> jax.Array:
    """Return ``(-second half, first half)`` of the last axis."""
    half = x_BTNH.shape[-1] // 2
    if mesh.platform() != "cpu":
        return jnp.concatenate([-x_BTNH[..., half:], x_BTNH[..., :half]], axis=-1)
    # On a CPU, slices of the innermost axis spoil the fusions around them; a product with a constant does not, and is
    # as exact.
    turn_HH = jnp.asarray(np.eye(2 * half, k=half) - np.eye(2 * half, k=-half), x_BTNH.dtype)
    return jax.lax.dot(x_BTNH.reshape(-1, 2 * half), turn_HH).reshape(x_BTNH.shape)

"""The one matmul of activations with a weight, and its gradient.

The weight's type decides how it is multiplied; today that is an array, the fp32 (or bf16) master itself. Left out on
purpose: products of one batch of activations with another, which are attention's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from luthier import mesh
from luthier.model.cpu import transposed


def dense(einsum: str, x: jax.Array, w: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """Return ``einsum(x, w)`` in ``out_dtype`` (default: that of ``x``), computed in the type of ``x``.

    ``einsum`` contracts the last axes of ``x`` with the first axes of ``w`` (``BTD,DF->BTF``: stored input first) or
    with its last (``BTF,DF->BTD``: stored output first). Both are as fast going forward; in the gradient of ``w``,
    the side that comes first in storage is the one that is transposed, so store the narrow side first.

    The gradient of ``w`` has the type of ``w`` and is summed over tokens in fp32, whatever the type of ``x``.
    Raises ValueError where ``einsum`` has another form.
    """
    _weight_axes(einsum)
    # Named here, so that the "dots" policy of `layers.remat` finds every matmul of a layer.
    return checkpoint_name(_array_dense(einsum, jnp.dtype(out_dtype or x.dtype), x, w), "dense")


def biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return ``x`` plus a bias where there is one, in the type of ``x``."""
    return x if bias is None else x + bias.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _array_dense(einsum: str, out_dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    return _product(einsum, x, w.astype(x.dtype), out_dtype)


def _array_dense_forward(einsum: str, out_dtype: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    # The master is kept and cast again in the backward pass: a scan over layers then saves no copy of the weights.
    return _array_dense(einsum, out_dtype, x, w), (x, w)


def _array_dense_backward(einsum: str, out_dtype: Any, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    dy = dy.astype(x.dtype)
    x_axes, w_axes, y_axes = _split(einsum)
    dx = _product(f"{y_axes},{w_axes}->{x_axes}", dy, w.astype(x.dtype), x.dtype)
    return dx, _weight_gradient(einsum, x, dy).astype(w.dtype)


_array_dense.defvjp(_array_dense_forward, _array_dense_backward)


def _product(einsum: str, x: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    if mesh.platform() != "cpu":
        return jnp.einsum(einsum, x, w, preferred_element_type=out_dtype)
    contracted, out, out_first = _weight_axes(einsum)
    rows = x.ndim - contracted
    x_MC = x.reshape(-1, math.prod(x.shape[rows:]))
    w_2d = w.reshape(math.prod(w.shape[: w.ndim - (contracted if out_first else out)]), -1)
    dimensions = (((1,), (1 if out_first else 0,)), ((), ()))
    y_MO = jax.lax.dot_general(x_MC, w_2d, dimensions, preferred_element_type=out_dtype)
    out_shape = w.shape[:out] if out_first else w.shape[contracted:]
    return y_MO.reshape(*x.shape[:rows], *out_shape)


def _weight_gradient(einsum: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Return the gradient of the weight in fp32, in the weight's shape."""
    x_axes, w_axes, y_axes = _split(einsum)
    if mesh.platform() != "cpu":
        return jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy, preferred_element_type=jnp.float32)
    contracted, out, out_first = _weight_axes(einsum)
    x_MC = x.reshape(-1, math.prod(x.shape[x.ndim - contracted :]))
    dy_MO = dy.reshape(-1, math.prod(dy.shape[dy.ndim - out :]))
    first, last = (dy_MO, x_MC) if out_first else (x_MC, dy_MO)
    gradient = jax.lax.dot(transposed(first), last, preferred_element_type=jnp.float32)
    sizes = dict(zip(x_axes + y_axes, x.shape + dy.shape, strict=True))
    return gradient.reshape([sizes[axis] for axis in w_axes])


def _split(einsum: str) -> tuple[str, str, str]:
    inputs, _, y_axes = einsum.partition("->")
    x_axes, _, w_axes = inputs.partition(",")
    return x_axes, w_axes, y_axes


@functools.cache
def _weight_axes(einsum: str) -> tuple[int, int, bool]:
    """Return how many axes of the weight are contracted, how many are its output's, and whether those come first."""
    x_axes, w_axes, y_axes = _split(einsum)
    contracted = "".join(axis for axis in x_axes if axis in w_axes)
    out = "".join(axis for axis in y_axes if axis in w_axes)
    rows = x_axes.removesuffix(contracted)
    if not contracted or not out or y_axes != rows + out or w_axes not in (contracted + out, out + contracted):
        raise ValueError(
            f"dense: einsum `{einsum}` is not `rows in, in out -> rows out` nor `rows in, out in -> rows out`"
        )
    return len(contracted), len(out), w_axes == out + contracted

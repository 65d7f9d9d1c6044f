"""The one matmul of activations with a weight, and its gradient.

The weight's type decides how it is multiplied: an array is the fp32 (or bf16) master itself and is trained; a quantised
weight and what lies under an adapter (``lora.Lora``) are frozen, so that no gradient of theirs is computed. Left out on
purpose: products of one batch of activations with another, which are attention's.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from luthier import mesh
from luthier.model.cpu import transposed
from luthier.model.lora import Lora, row_norms
from luthier.model.quant import gathered, is_quantised


class Types(NamedTuple):
    """Of a product: the type of ``x``, the one it is computed in, and the one of what comes out."""

    x: Any
    dtype: Any
    out: Any


def dense(
    einsum: str, x: jax.Array, w: Any, *, dtype: Any = None, out_dtype: Any = None, keep: bool = True
) -> jax.Array:
    """Return ``einsum(x, w)`` in ``out_dtype``, computed in ``dtype``; both are the type of ``x`` where left out.

    An ``x`` of a longer type than ``dtype`` is not rounded to it but goes in as two numbers, which makes the product
    twice as long. ``w`` is rounded, and in the gradients' products ``x`` is.

    ``einsum`` contracts the last axes of ``x`` with the first axes of ``w`` (``BTD,DF->BTF``: stored input first) or
    with its last (``BTF,DF->BTD``: stored output first). Both are as fast going forward; in the gradient of ``w``,
    the side that comes first in storage is the one that is transposed, so store the narrow side first.

    The gradient of ``w`` has the type of ``w`` and is summed over tokens in fp32, whatever the type of ``x``. Of a
    quantised ``w`` there is none, and of a ``Lora`` that of the adapter alone.
    Without ``keep``, the "dots" policy of ``layers.remat`` does not save what comes out, since another form of it is.
    Raises ValueError where ``einsum`` has another form.
    """
    _weight_axes(einsum)
    types = Types(x.dtype, jnp.dtype(dtype or x.dtype), jnp.dtype(out_dtype or x.dtype))
    y: Any
    if isinstance(w, Lora):
        y = _adapted(einsum, types, x, w)
    elif is_quantised(w):
        y = _frozen_dense(einsum, types, x, w)
    else:
        y = _array_dense(einsum, types, x, w)
    # Named here, so that the "dots" policy of `layers.remat` finds every matmul of a layer.
    return checkpoint_name(y, "dense") if keep else y


def biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return ``x`` plus a bias where there is one, in the type of ``x``."""
    return x if bias is None else x + bias.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _array_dense(einsum: str, types: Types, x: jax.Array, w: jax.Array) -> jax.Array:
    return _exact_product(einsum, types, x, w.astype(types.dtype))


def _array_dense_forward(einsum: str, types: Types, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    # The master is kept and cast again in the backward pass: a scan over layers then saves no copy of the weights.
    return _array_dense(einsum, types, x, w), (x.astype(types.dtype), w)


def _array_dense_backward(einsum: str, types: Types, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    dy = dy.astype(types.dtype)
    x_axes, w_axes, y_axes = _split(einsum)
    dx = _product(f"{y_axes},{w_axes}->{x_axes}", dy, w.astype(types.dtype), types.x)
    return dx, _weight_gradient(einsum, x, dy).astype(w.dtype)


_array_dense.defvjp(_array_dense_forward, _array_dense_backward)


def _frozen_dense(einsum: str, types: Types, x: jax.Array, w: Any) -> jax.Array:
    """Return the product with a weight, an array or quantised, that has no gradient."""
    return _frozen(einsum, types, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen(einsum: str, types: Types, x: jax.Array, w: Any) -> jax.Array:
    if not is_quantised(w):
        return _exact_product(einsum, types, x, w.astype(types.dtype))
    contracted, out, out_first = _weight_axes(einsum)
    lead = x.ndim - contracted
    rows = _split(einsum)[0][:lead]
    matrix_OI = gathered(w).matrix(types.dtype)
    y = _exact_product(f"{rows}i,oi->{rows}o", types, x.reshape(*x.shape[:lead], -1), matrix_OI)
    return y.reshape(*x.shape[:lead], *(w.shape[:out] if out_first else w.shape[contracted:]))


def _frozen_forward(einsum: str, types: Types, x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    # Of a quantised weight the codes are kept, and of `x` nothing.
    return _frozen(einsum, types, x, w), w


def _frozen_backward(einsum: str, types: Types, w: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    x_axes, w_axes, y_axes = _split(einsum)
    dy = dy.astype(types.dtype)
    if not is_quantised(w):
        return _product(f"{y_axes},{w_axes}->{x_axes}", dy, w.astype(types.dtype), types.x), None
    contracted, out, out_first = _weight_axes(einsum)
    lead = dy.ndim - out
    rows = y_axes[:lead]
    matrix_OI = gathered(w).matrix(types.dtype)
    dx = _product(f"{rows}o,oi->{rows}i", dy.reshape(*dy.shape[:lead], -1), matrix_OI, types.x)
    return dx.reshape(*dy.shape[:lead], *(w.shape[out:] if out_first else w.shape[:contracted])), None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def _adapted(einsum: str, types: Types, x: jax.Array, w: Lora) -> jax.Array:
    """Return the product with a weight and its adapter.

    With DoRA (arXiv 2402.09353, equation 5), rows of the sum of both are scaled to ``magnitude``, and what scales them
    is constant in the gradient but for the magnitude itself (section 4.3). As in PEFT, the base's part of what DoRA
    changes has dropout too.
    """
    y = _frozen_dense(einsum, types, x, w.base)
    dropped = x if w.key is None else _dropout(x, w.key, w.rate)
    delta = _delta(einsum, types, dropped, w).reshape(y.shape)
    if w.magnitude is None:
        return y + delta
    out = _weight_axes(einsum)[1]
    factor = dora_factor(einsum, w).reshape(y.shape[y.ndim - out :]).astype(types.out)
    if w.key is None:
        return factor * (y + delta)
    return y + (factor - 1) * _frozen_dense(einsum, types, dropped, w.base) + factor * delta


def _delta(einsum: str, types: Types, x: jax.Array, w: Lora) -> jax.Array:
    """Return what an adapter adds, its output axes flattened to one."""
    axes = _split(einsum)[0][: x.ndim - _weight_axes(einsum)[0]]
    inner = _array_dense(f"{axes}i,ri->{axes}r", types._replace(out=types.x), x.reshape(*x.shape[: len(axes)], -1), w.a)
    inner = scaled(checkpoint_name(inner, "dense"), w)
    # The narrow side first, see `dense`.
    return _array_dense(f"{axes}r,ro->{axes}o", types, inner, w.b.T)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Return ``x`` in its own type, its numbers those that ``dtype`` has too."""
    short = jnp.finfo(dtype)
    # Not by casting there and back, which XLA takes for nothing at all.
    return jax.lax.reduce_precision(x, short.nexp, short.nmant)


def scaled(inner: jax.Array, w: Lora) -> jax.Array:
    """Return an adapter's inner numbers ``[B, ..., r]`` times its scale, or times what each row of the batch has."""
    if w.gate_BR is None:
        return inner * w.scale
    B, R = w.gate_BR.shape
    return inner * w.gate_BR.astype(inner.dtype).reshape(B, *[1] * (inner.ndim - 2), R)


def dora_factor(einsum: str, w: Lora) -> jax.Array:
    """Return what DoRA multiplies each output with, fp32 ``[O]``: the magnitude over the norm, which is constant."""
    assert w.magnitude is not None
    return w.magnitude / _row_norms(einsum, w)


def _dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def _row_norms(einsum: str, w: Lora) -> jax.Array:
    """Return the fp32 norms ``[O]`` of the rows of ``base + scale * b @ a``."""
    if w.norms is not None:
        return w.norms
    frozen = jax.lax.stop_gradient(w)
    return checkpoint_name(row_norms(_rows_by_columns(einsum, frozen.base), frozen), "dense")


def _rows_by_columns(einsum: str, w: Any) -> jax.Array:
    """Return a weight, an array or quantised, as fp32 ``[O, I]``."""
    if is_quantised(w):
        return w.matrix(jnp.float32)
    contracted, out, out_first = _weight_axes(einsum)
    w = w.astype(jnp.float32)
    if out_first:
        return w.reshape(math.prod(w.shape[:out]), -1)
    return w.reshape(math.prod(w.shape[:contracted]), -1).T


def _exact_product(einsum: str, types: Types, x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the product with a ``w`` of ``types.dtype``; an ``x`` that is longer goes in as two such numbers."""
    if x.dtype == types.dtype:
        return _product(einsum, x, w, types.out)
    high = rounded(x, types.dtype)
    x_axes, w_axes, y_axes = _split(einsum)
    at = x.ndim - _weight_axes(einsum)[0]
    both = jnp.stack([high, x - high], axis=at).astype(types.dtype)
    y = _product(f"{x_axes[:at]}z{x_axes[at:]},{w_axes}->{y_axes[:at]}z{y_axes[at:]}", both, w, x.dtype)
    return y.sum(axis=at).astype(types.out)


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

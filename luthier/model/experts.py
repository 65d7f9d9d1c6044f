"""One matmul for many experts: rows sorted by expert, each times its own expert's weight, and the gradient.

``jax.lax.ragged_dot`` says the same, but outside a TPU XLA multiplies every row with every expert. There, tiles of rows
are multiplied one after another, each with the one weight it needs, so that the work is that of the chosen experts.

What a weight is decides its type, as for ``dense``: an array is trained, and quantised weights and those under an
adapter are not.

Left out on purpose: rows in any other order (``moe``), and biases, which are additions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from luthier import mesh
from luthier.model.cpu import transposed
from luthier.model.lora import Lora
from luthier.model.quant import is_quantised

# Rows of a tile, at least and at most. Small ones waste fewer rows at the end of each expert's, large ones read a
# weight less often.
TILE = {"cpu": (8, 256), "gpu": (16, 512)}

_FORWARD = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_BACKWARD = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_WEIGHT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped(x_MI: jax.Array, w_EIO: Any, sizes_E: jax.Array) -> jax.Array:
    """Return ``[M, O]`` in the type of ``x``: the first ``sizes_E[0]`` rows times ``w_EIO[0]``, the next times ``[1]``.

    Rows after the last expert's are zero. The gradient of ``w`` has the type of ``w`` and is summed over rows in fp32,
    whatever the type of ``x``; of a quantised ``w`` there is none, and of a ``Lora`` that of the adapter alone.
    """
    if isinstance(w_EIO, Lora):
        y_MO = _frozen(x_MI.dtype, x_MI, w_EIO.base, sizes_E)
        inner_MR = checkpoint_name(_grouped(x_MI, w_EIO.a.mT, sizes_E), "dense")
        y_MO = y_MO + _grouped(inner_MR * w_EIO.scale, w_EIO.b.mT, sizes_E)
    elif is_quantised(w_EIO):
        y_MO = _frozen(x_MI.dtype, x_MI, w_EIO, sizes_E)
    else:
        y_MO = _grouped(x_MI, w_EIO, sizes_E)
    return checkpoint_name(y_MO, "dense")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(dtype: Any, x_MI: jax.Array, w: Any, sizes_E: jax.Array) -> jax.Array:
    """Return the product with a weight, an array or quantised, that has no gradient."""
    return _rows_times_experts(x_MI, w, sizes_E)


def _frozen_forward(dtype: Any, x_MI: jax.Array, w: Any, sizes_E: jax.Array) -> tuple[jax.Array, Any]:
    return _frozen(dtype, x_MI, w, sizes_E), (w, sizes_E)


def _frozen_backward(dtype: Any, saved: Any, dy_MO: jax.Array) -> tuple[jax.Array, None, None]:
    w, sizes_E = saved
    return _rows_times_experts(dy_MO.astype(dtype), w, sizes_E, back=True), None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def _rows_times_experts(x: jax.Array, w: Any, sizes_E: jax.Array, back: bool = False) -> jax.Array:
    """Return rows times their expert's weight, or with ``back`` its transpose."""
    if mesh.platform() != "tpu":
        return tiled_forward(x, w, sizes_E, back)
    if is_quantised(w):
        return _ragged(x, w.matrix(x.dtype), sizes_E, _FORWARD if back else _BACKWARD)
    return _ragged(x, w, sizes_E, _BACKWARD if back else _FORWARD)


@jax.custom_vjp
def _grouped(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _rows_times_experts(x_MI, w_EIO, sizes_E)


def _grouped_forward(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Any]:
    return _grouped(x_MI, w_EIO, sizes_E), (x_MI, w_EIO, sizes_E)


def _grouped_backward(saved: Any, dy_MO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MI, w_EIO, sizes_E = saved
    backward = ragged_backward if mesh.platform() == "tpu" else tiled_backward
    dx_MI, dw_EIO = backward(x_MI, w_EIO, sizes_E, dy_MO.astype(x_MI.dtype))
    return dx_MI, dw_EIO.astype(w_EIO.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def ragged_forward(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Return ``grouped``'s value by XLA's own instruction."""
    return _ragged(x_MI, w_EIO, sizes_E, _FORWARD)


def ragged_backward(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, dy_MO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of (x, w) by XLA's own instruction, that of ``w`` in fp32."""
    dw_EIO = jax.lax.ragged_dot_general(x_MI, dy_MO, sizes_E, _WEIGHT, preferred_element_type=jnp.float32)
    return _ragged(dy_MO, w_EIO, sizes_E, _BACKWARD), dw_EIO


def _ragged(x: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, dimensions: Any) -> jax.Array:
    y = jax.lax.ragged_dot_general(x, w_EIO.astype(x.dtype), sizes_E, dimensions, preferred_element_type=x.dtype)
    # What the instruction leaves in rows of no expert is not said anywhere.
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes_E), y, 0)


def tiled_forward(x_MI: jax.Array, w_EIO: Any, sizes_E: jax.Array, back: bool = False) -> jax.Array:
    """Return ``grouped``'s value, tile by tile; with ``back``, the product with each weight's transpose.

    Of a quantised weight, one expert's matrix at a time is a float.
    """
    # A quantised weight is stored output first.
    contracted = 1 if is_quantised(w_EIO) != back else 0

    def step(y_MO: jax.Array, expert: jax.Array, start: jax.Array, own_R1: jax.Array) -> jax.Array:
        w = _floats(w_EIO, expert, x_MI.dtype)
        y_RO = jax.lax.dot_general(_rows(x_MI, start, own_R1), w, (((1,), (contracted,)), ((), ())))
        return _put(y_MO, y_RO, start, own_R1)

    one = jax.eval_shape(lambda w: _floats(w, 0, x_MI.dtype), w_EIO)
    start = jnp.zeros((x_MI.shape[0], one.shape[1 - contracted]), x_MI.dtype)
    return _over_tiles(step, start, sizes_E)


def tiled_backward(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, dy_MO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of (x, w), tile by tile, that of ``w`` in fp32."""

    def step(carry: Any, expert: jax.Array, start: jax.Array, own_R1: jax.Array) -> Any:
        dx_MI, dw_EIO = carry
        w_IO = _weight(w_EIO, expert).astype(dy_MO.dtype)
        dy_RO = _rows(dy_MO, start, own_R1)
        x_RI = jnp.where(own_R1, _rows(x_MI, start, own_R1), 0)
        dw_IO = _weight(dw_EIO, expert) + jax.lax.dot(transposed(x_RI), dy_RO, preferred_element_type=jnp.float32)
        dx_RI = jax.lax.dot_general(dy_RO, w_IO, (((1,), (1,)), ((), ())))
        return (
            _put(dx_MI, dx_RI, start, own_R1),
            jax.lax.dynamic_update_slice(dw_EIO, dw_IO[None], (expert, 0, 0)),
        )

    return _over_tiles(step, (jnp.zeros_like(x_MI), jnp.zeros(w_EIO.shape, jnp.float32)), sizes_E)


def _over_tiles(step: Callable[..., Any], carry: Any, sizes_E: jax.Array) -> Any:
    """Run ``step(carry, expert, first row, which rows are the expert's)`` over as many tiles as the experts' rows need.

    The first leaf of ``carry`` has a row for each of the M.
    """
    M, E = jax.tree.leaves(carry)[0].shape[0], sizes_E.shape[0]
    size = tile_rows(M, E)
    ends_E, tiles_E = jnp.cumsum(sizes_E), (sizes_E + size - 1) // size
    last_E = jnp.cumsum(tiles_E)

    def tile(number: jax.Array, carry: Any) -> Any:
        expert = jnp.sum(last_E <= number)
        begin = ends_E[expert] - sizes_E[expert] + (number - last_E[expert] + tiles_E[expert]) * size
        start = jnp.minimum(begin, M - size)  # the last tile stays inside by taking rows before its own
        rows_R = start + jnp.arange(size)
        return step(carry, expert, start, ((rows_R >= begin) & (rows_R < ends_E[expert]))[:, None])

    return jax.lax.fori_loop(0, last_E[-1], tile, carry)


def tile_rows(M: int, E: int) -> int:
    """Return how many rows a tile has: a quarter of an expert's, if all have as many, as a power of two."""
    least, most = TILE[mesh.platform()]
    return min(M, max(least, min(most, 1 << (max(M // (4 * E), 1) - 1).bit_length())))


def _floats(w: Any, expert: Any, dtype: Any) -> jax.Array:
    """Return one expert's matrix in ``dtype``, an array's input first, a quantised weight's output first."""
    one = jax.tree.map(lambda field: _weight(field, expert), w)
    return one.matrix(dtype) if is_quantised(one) else one.astype(dtype)


def _weight(w_EIO: jax.Array, expert: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w_EIO, expert, keepdims=False)


def _rows(x: jax.Array, start: jax.Array, own_R1: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, own_R1.shape[0])


def _put(y: jax.Array, tile: jax.Array, start: jax.Array, own_R1: jax.Array) -> jax.Array:
    """Write the rows of a tile that are the expert's own."""
    kept = jnp.where(own_R1, tile, _rows(y, start, own_R1))
    return jax.lax.dynamic_update_slice_in_dim(y, kept, start, 0)

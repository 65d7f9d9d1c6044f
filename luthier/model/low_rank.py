"""The nearest matrix of low rank, as the two factors of an adapter.

Left out on purpose: a whole singular value decomposition, which takes minutes for each matrix of a large model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MORE = 10  # columns looked at beside those asked for
ROUNDS = 16


def factors(matrix_OI: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return fp32 (a ``[rank, I]``, b ``[O, rank]``) whose product ``b @ a`` is nearly the nearest to a fp32 matrix.

    Each takes the root of the singular values. By subspace iteration from random columns (Halko, Martinsson and Tropp,
    arXiv 0909.4061, algorithm 4.4). A rank beyond the matrix's own is filled with zeros.
    """
    columns = min(rank + MORE, *matrix_OI.shape)
    with jax.default_matmul_precision("highest"):
        start_IC = jax.random.normal(key, (matrix_OI.shape[1], columns), jnp.float32)
        basis_OC = _basis(matrix_OI @ start_IC)
        basis_OC = jax.lax.fori_loop(
            0, ROUNDS, lambda _, basis_OC: _basis(matrix_OI @ _basis(matrix_OI.T @ basis_OC)), basis_OC
        )
        left_CC, values_C, right_CI = jnp.linalg.svd(basis_OC.T @ matrix_OI, full_matrices=False)
        roots_C = jnp.sqrt(values_C)
        a_CI, b_OC = roots_C[:, None] * right_CI, (basis_OC @ left_CC) * roots_C
    missing = max(0, rank - columns)
    return jnp.pad(a_CI[:rank], ((0, missing), (0, 0))), jnp.pad(b_OC[:, :rank], ((0, 0), (0, missing)))


def _basis(vectors: jax.Array) -> jax.Array:
    return jnp.linalg.qr(vectors)[0]

"""What a model keeps of the tokens it has read: keys and values, a row for each sequence.

A forward pass only reads the cache, and returns the keys and values of its own tokens; ``write`` puts those in their
places afterwards, for all layers at once. So nothing is copied but what is new, and a donated cache stays where it is.

Position p of a sequence lies at slot ``p % S`` of its row. Where S covers the whole sequence that is p itself; layers
with a sliding window keep a ring of the window's size, which holds all that they may still look at.

Left out on purpose: which sequence has which row (``rollout.local``), and pages, since rows are planned to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from luthier import mesh as mesh_lib

BLOCK = 128  # slots that attention reads at a time; rows are whole blocks
AXES = ("layer", "batch", "kv_heads", "slots", "head_dim")
ROUTES = "routes"
"""The name of a line that keeps which experts tokens were sent to, in the place of keys (arXiv 2510.11370)."""


@dataclass(frozen=True)
class Line:
    """What each of a stack of ``layers`` keeps for a token: ``heads`` keys and values of ``width`` numbers.

    With a ``window``, for that many of the last tokens alone. ``values`` is the size of a value where it is another
    than the key's; 0 where values are the first numbers of the keys, as in multi-head latent attention
    (arXiv 2405.04434), and not stored a second time. They are of type ``dtype``; None: of the cache's.
    """

    layers: int
    heads: int
    width: int
    window: int | None = None
    values: int | None = None
    dtype: Any = None

    @property
    def widths(self) -> tuple[int, int]:
        """The sizes of a key and of a value as they are stored."""
        return self.width, self.width if self.values is None else self.values

    def slots(self, length: int) -> int:
        """Return the slots of a row for sequences of ``length`` tokens, in whole blocks where there are several."""
        needed = length if self.window is None else min(length, self.window)
        return needed if needed <= BLOCK else -(-needed // BLOCK) * BLOCK

    def empty(self, rows: int, length: int, dtype: Any) -> KeysValues:
        """Return zeros for ``rows`` sequences of ``length`` tokens."""
        shape, (keys, values) = (self.layers, rows, self.heads, self.slots(length)), self.widths
        zeros = lambda width: _placed(jnp.zeros((*shape, width), self.dtype or dtype))  # noqa: E731
        return KeysValues(zeros(keys), zeros(values) if values else None)


Lines = Mapping[str, Line]
"""The lines of a model, by the names of its stacks of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one line: ``k_LRKSH`` and ``v_LRKSH`` (layers, rows, KV heads, slots, head size).

    No values, where they are the first numbers of the keys.
    """

    k_LRKSH: jax.Array
    v_LRKSH: jax.Array | None


Cache = dict[str, KeysValues]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fresh:
    """Keys and values of a pass's own tokens, ``[B, T, K, H]``; stacked over layers, ``[L, B, T, K, H]``.

    No values, where they are the first numbers of the keys.
    """

    k_BTKH: jax.Array
    v_BTKH: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Past:
    """The cache as a batch sees it: sequence b lies in row ``rows_B[b]``, of which ``lengths_B[b]`` tokens are read.

    ``rows_B`` None: sequence b lies in row b, which is cheaper to reach.
    """

    cache: Cache
    lengths_B: jax.Array
    rows_B: jax.Array | None = None

    def layer(self, line: str, index: jax.Array) -> LayerPast:
        """Return what layer ``index`` of a line sees."""
        return LayerPast(self.cache[line], index, self.lengths_B, self.rows_B)


@dataclass(frozen=True)
class LayerPast:
    """One layer's past."""

    stored: KeysValues
    index: jax.Array
    lengths_B: jax.Array
    rows_B: jax.Array | None

    @property
    def slots(self) -> int:
        """The slots of a row."""
        return self.stored.k_LRKSH.shape[3]

    @property
    def block(self) -> int:
        """The slots that are read at a time."""
        return min(self.slots, BLOCK)

    @property
    def blocks(self) -> jax.Array:
        """How many blocks hold anything, of the longest sequence in the batch."""
        used = jnp.minimum(jnp.max(self.lengths_B), self.slots)
        return (used + self.block - 1) // self.block

    def read(self, number: jax.Array, values: int) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of a block of slots, ``[B, K, block, H]`` each; a value has ``values`` numbers."""
        keys = self._cut(self.stored.k_LRKSH, number)
        if self.stored.v_LRKSH is None:
            return keys, keys[..., :values]
        return keys, self._cut(self.stored.v_LRKSH, number)

    def positions(self, number: jax.Array) -> jax.Array:
        """Return which position each slot of a block holds, ``[B, block]``; negative where it holds none."""
        slots_S = number * self.block + jnp.arange(self.block)
        last_B1 = self.lengths_B[:, None] - 1
        return last_B1 - (last_B1 - slots_S) % self.slots

    def _cut(self, x_LRKSH: jax.Array, number: jax.Array) -> jax.Array:
        _, _, heads, _, width = x_LRKSH.shape
        start = number * self.block
        if self.rows_B is None:
            sizes = (1, self.lengths_B.shape[0], heads, self.block, width)
            return jax.lax.dynamic_slice(x_LRKSH, (self.index, 0, 0, start, 0), sizes)[0]
        sizes = (1, 1, heads, self.block, width)
        cut = lambda row: jax.lax.dynamic_slice(x_LRKSH, (self.index, row, 0, start, 0), sizes)[0, 0]  # noqa: E731
        return jax.vmap(cut)(self.rows_B)


def row_bytes(lines: Lines, length: int, dtype: Any) -> int:
    """Return the bytes of one sequence of ``length`` tokens, over all layers."""
    return sum(
        line.layers * line.heads * line.slots(length) * sum(line.widths) * jnp.dtype(line.dtype or dtype).itemsize
        for line in lines.values()
    )


def make(lines: Lines, rows: int, length: int, dtype: Any, mesh: Mesh) -> Cache:
    """Return an empty cache for ``rows`` sequences of ``length`` tokens, split over the mesh as the model is."""

    @jax.jit
    def zeros() -> Cache:
        return {name: line.empty(rows, length, dtype) for name, line in lines.items()}

    with mesh_lib.use(mesh):
        return zeros()


def _placed(x_LRKSH: jax.Array) -> jax.Array:
    """Pin the layout of a part of the cache: a program gives it back as it got it, and can be given it again."""
    return mesh_lib.constrain(x_LRKSH, *AXES)


def write(past: Past, fresh: Mapping[str, Fresh], counts_B: jax.Array) -> Cache:
    """Return the cache with the first ``counts_B[b]`` of each sequence's fresh tokens put after its past."""
    return {name: _write(past, past.cache[name], stacked, counts_B) for name, stacked in fresh.items()}


def _write(past: Past, stored: KeysValues, fresh: Fresh, counts_B: jax.Array) -> KeysValues:
    slots = stored.k_LRKSH.shape[3]
    _, B, T, _, _ = fresh.k_BTKH.shape
    tokens_T = jnp.arange(T)
    # Of more tokens than a ring holds only the last ones stay. An index beyond the row is dropped.
    kept_BT = (tokens_T < counts_B[:, None]) & (tokens_T >= counts_B[:, None] - slots)
    slots_BT = jnp.where(kept_BT, (past.lengths_B[:, None] + tokens_T) % slots, slots)
    rows_B = jnp.arange(B) if past.rows_B is None else past.rows_B

    def put(x_LRKSH: jax.Array, x_LBTKH: jax.Array) -> jax.Array:
        # Indices on both sides of a slice move its axes to the front: [B, T, L, K, H].
        values = x_LBTKH.astype(x_LRKSH.dtype).transpose(1, 2, 0, 3, 4)
        return _placed(x_LRKSH.at[:, rows_B[:, None], :, slots_BT].set(values, mode="drop"))

    return jax.tree.map(put, stored, KeysValues(fresh.k_BTKH, fresh.v_BTKH))


def copy_rows(cache: Cache, sources_P: jax.Array, targets_P: jax.Array, count: jax.Array) -> Cache:
    """Return the cache with row ``targets_P[i]`` made like row ``sources_P[i]``, in order, for i below ``count``."""

    def copy(i: jax.Array, cache: Cache) -> Cache:
        def one(x_LRKSH: jax.Array) -> jax.Array:
            # By gather and scatter: a slice at a traced row of an axis that is split over devices would bring all of it
            # to each of them.
            source_1, target_1 = (jax.lax.dynamic_slice_in_dim(rows_P, i, 1) for rows_P in (sources_P, targets_P))
            row = x_LRKSH.at[:, source_1].get(mode="clip")
            return x_LRKSH.at[:, target_1].set(row, mode="drop")

        return jax.tree.map(one, cache)

    return jax.tree.map(_placed, jax.lax.fori_loop(0, count, copy, cache))

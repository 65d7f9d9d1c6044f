"""How many sequences of what length the cache is made for.

Left out on purpose: moving a cache that is too small. The engine makes a larger one while it is idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from luthier import memory
from luthier import mesh as mesh_lib
from luthier.config import EngineKeys
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.model import cache

MOST_ROWS = {"cpu": 32, "gpu": 256, "tpu": 256}  # beyond these, tokens a second hardly grow
ROWS_FIRST, LENGTH_FIRST = 8, 4096
SHARE = {"cpu": 0.25, "gpu": 0.8, "tpu": 0.8}  # of free memory, for the cache
MANY = 16  # rows, beside which one more hardly costs memory, and of which one less hardly costs speed


@dataclass(frozen=True)
class Size:
    """The cache's rows, and the tokens of each; and the ``keepers``, rows beside them that keep a prompt: 0 or 1."""

    rows: int
    length: int
    keepers: int = 0

    @property
    def stored(self) -> int:
        """All rows that there is memory for."""
        return self.rows + self.keepers


@dataclass(frozen=True)
class Limits:
    """What bounds the cache: the keys, the tokens that the model was made for (None: any), and the model's lines."""

    keys: EngineKeys
    context_length: int | None
    lines: cache.Lines
    dtype: Any
    mesh: Mesh

    @property
    def length(self) -> int | None:
        """The most tokens of a sequence, None where neither the key nor the model says."""
        return self.keys.max_target_length or self.context_length

    def size(self, sequences: int | None, length: int | None, old: Size | None = None) -> Size:
        """Return the size for this many sequences of this length at a time; None: as many, as long as there can be.

        A length that neither caller nor key asks for gives way to memory: it is halved until ``ROWS_FIRST`` sequences
        fit, or it is at ``LENGTH_FIRST``. ``MANY`` rows that lose what they begin with get a keeper: one more, or where
        memory is short for all that are wanted, one of them. Rows that are split over devices get none, since a token
        is drawn in all of them. ``old`` is the cache that this one takes the place of.

        Raises UserError where not even one sequence fits.
        """
        most = self.keys.max_num_seqs or MOST_ROWS[self._platform]
        shards, tokens = mesh_lib.batch_shards(self.mesh), self._length(length)
        wanted = -(-min(most, sequences or most) // shards) * shards
        budget = self._budget(old)
        if length is None and not self.keys.max_target_length:
            while tokens > LENGTH_FIRST and self._fitting(tokens, budget, wanted) < min(wanted, ROWS_FIRST):
                tokens = max(LENGTH_FIRST, tokens // 2)
        rows = self._fitting(tokens, budget, wanted)
        if rows < 1:
            raise UserError(self._nothing_fits(tokens, budget))
        size = Size(rows, tokens)
        if shards > 1 or rows < MANY or not self._forgets(tokens):
            return size
        if self._fitting(tokens, budget, rows + 1) > rows:
            return replace(size, keepers=1)
        return Size(rows - 1, tokens, 1) if rows < wanted else size

    def grown(self, old: Size, sequences: int | None, length: int | None) -> Size:
        """Return the size to which a cache is to grow for what is wanted, as in ``size``.

        It is ``old`` itself where that is enough, or is long enough and there is no memory for more rows: sequences can
        wait. Raises UserError where not even one sequence fits.
        """
        long_enough = length is not None and self._length(length) <= old.length
        if long_enough and sequences is not None and sequences <= old.rows:
            return old
        try:
            size = self.size(sequences, length, old)
            if old.rows:
                most = sequences and max(sequences, old.rows)
                size = self.size(most, max(size.length, old.length), old)
        except UserError:
            if not (old.rows and long_enough):
                raise
            return old
        return size if size.rows > old.rows or size.length > old.length else old

    def _forgets(self, length: int) -> bool:
        """Return whether a row that goes on loses its beginning: some layers keep a window alone."""
        return any(line.slots(length) < length for line in self.lines.values())

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def _fitting(self, length: int, budget: float, wanted: int) -> int:
        """Return how many of the wanted sequences fit, a multiple of the devices that they are split over."""
        shards = mesh_lib.batch_shards(self.mesh)
        each = wanted / shards if math.isinf(budget) else budget // self._bytes(length)
        return min(wanted, int(each) * shards)

    def _length(self, wanted: int | None) -> int:
        """Return the tokens of a row: the key's, else as many as are wanted, else all that the model was made for."""
        if self.keys.max_target_length:
            return self.keys.max_target_length
        if wanted is None and self.context_length is None:
            raise UserError("max_target_length=0: the model's config.json names no limit. Set the key to one.")
        rounded = wanted and -(-wanted // 128) * 128  # so that few different lengths are compiled for
        return min(length for length in (self.context_length, rounded) if length)

    def _budget(self, old: Size | None) -> float:
        """Return the bytes for the cache on each device; infinite where the platform does not say what is free."""
        if self.keys.kv_cache_gib is not None:
            return self.keys.kv_cache_gib * GIB
        free = memory.available(self.mesh)
        ours = 0.0 if old is None else self._bytes(old.length) * old.stored / mesh_lib.batch_shards(self.mesh)
        return math.inf if free is None else SHARE[self._platform] * (free + ours)

    def _bytes(self, length: int) -> float:
        """Return the bytes of one row on a device that holds it, or its part of the heads."""
        tensor = self.mesh.shape["tensor"]
        return sum(
            cache.row_bytes({name: line}, length, self.dtype) / (1 if line.heads % tensor else tensor)
            for name, line in self.lines.items()
        )

    def _nothing_fits(self, length: int, budget: float) -> str:
        row = self._bytes(length)
        fitting = int(budget // (row / length))
        name = "kv_cache_gib" if self.keys.kv_cache_gib is not None else "the cache's share of free memory"
        remedies = [
            f"max_target_length={fitting} fits" if fitting > 1 else "",
            f"kv_cache_gib={row / GIB:.2g} is enough",
        ]
        if jnp.dtype(self.dtype).itemsize > 2:
            remedies.append("kv_cache_dtype=bfloat16 takes half")
        return (
            f"keys and values of {length} tokens take {row / GIB:.2g} GiB, and {name} is {budget / GIB:.2g} "
            f"GiB on each device: {'; '.join(filter(None, remedies))}."
        )


def buckets(most: int) -> tuple[int, ...]:
    """Return the numbers of rows that programs are compiled for: 1, 8, 32, 128 and so on, up to ``most``."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, 8 if sizes[-1] == 1 else 4 * sizes[-1]))
    return tuple(sizes)


def bucket(sizes: tuple[int, ...], needed: int) -> int:
    """Return the smallest of ascending ``sizes`` that is enough."""
    return next(size for size in sizes if size >= needed)

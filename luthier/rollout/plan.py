"""How many sequences of what length the cache is made for.

Left out on purpose: moving a cache that is too small. The engine makes a larger one while it is idle.
"""

from __future__ import annotations

from dataclasses import dataclass
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
SHARE = {"cpu": 0.25, "gpu": 0.8, "tpu": 0.8}  # of free memory, for the cache


@dataclass(frozen=True)
class Size:
    """The cache's rows, and the tokens of each."""

    rows: int
    length: int


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

    def size(self, sequences: int | None, length: int | None) -> Size:
        """Return the size for this many sequences of this length at a time; None: as many, as long as there can be.

        Raises UserError where not even one such sequence fits the memory.
        """
        platform = self.mesh.devices.flat[0].platform
        length = self._length(length)
        most = self.keys.max_num_seqs or MOST_ROWS[platform]
        wanted = min(most, sequences or most)
        shards = mesh_lib.batch_shards(self.mesh)
        wanted = -(-wanted // shards) * shards
        fitting = int(self.budget(platform) // self._bytes(length)) // shards * shards
        if fitting < 1:
            raise UserError(self._nothing_fits(length, platform))
        return Size(min(wanted, fitting), length)

    def _length(self, wanted: int | None) -> int:
        """Return the tokens of a row: the key's, else as many as are wanted, else all that the model was made for."""
        if self.keys.max_target_length:
            return self.keys.max_target_length
        if wanted is None and self.context_length is None:
            raise UserError("max_target_length=0: the model's config.json names no limit. Set the key to one.")
        # Rounded up, so that few different lengths are compiled for.
        return min(*(n for n in (self.context_length, wanted and -(-wanted // 128) * 128) if n), 1 << 30)

    def budget(self, platform: str) -> float:
        """Return the bytes for the cache on all devices that hold different rows of it."""
        shards = mesh_lib.batch_shards(self.mesh)
        if self.keys.kv_cache_gib is not None:
            return self.keys.kv_cache_gib * GIB * shards
        free = memory.available(self.mesh)
        return float("inf") if free is None else SHARE[platform] * free * shards

    def _bytes(self, length: int) -> float:
        """Return the bytes of one row on a device that holds it, or its part of the heads."""
        tensor = self.mesh.shape["tensor"]
        split = tensor if all(line.heads % tensor == 0 for line in self.lines.values()) else 1
        return cache.row_bytes(self.lines, length, self.dtype) / split

    def _nothing_fits(self, length: int, platform: str) -> str:
        budget, row = self.budget(platform), self._bytes(length)
        shards = mesh_lib.batch_shards(self.mesh)
        fitting = int(budget / shards // (row / length))
        name = "kv_cache_gib" if self.keys.kv_cache_gib is not None else "the cache's share of free memory"
        remedies = [
            f"max_target_length={fitting} fits" if fitting > 1 else "",
            f"kv_cache_gib={row / GIB:.2g} is enough",
        ]
        if jnp.dtype(self.dtype).itemsize > 2:
            remedies.append("kv_cache_dtype=bfloat16 takes half")
        return (
            f"keys and values of {length} tokens take {row / GIB:.2g} GiB, and {name} is {budget / shards / GIB:.2g} "
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

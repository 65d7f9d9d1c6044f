"""The cache, and attention to it, against plain attention: windows, sinks, soft caps, and values within the keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import cache
from luthier.model.attention import attention
from luthier.model.cache import Cache, Fresh, Line, Past

LENGTHS = np.asarray([29, 17, 23])


def read_in_pieces(
    line: Line, inputs: dict[str, jax.Array], pieces: list[list[int]], here: Any, **settings: Any
) -> np.ndarray:
    """Return the output ``[B, T, N, H]`` with row b read by ``pieces[i][b]`` tokens at a time.

    Rows lie out of order in a cache with one row more, and tokens beyond a row's own are spoiled.
    """

    @jax.jit
    def extend(stored: Cache, part: dict[str, jax.Array], done_B: jax.Array, counts_B: jax.Array) -> Any:
        past = Past(stored, done_B, jnp.asarray([3, 0, 2]))
        of_layer = past.layer("all", jnp.int32(1))
        out = attention(part["q"], part["k"], part["v"], None, window=line.window, past=of_layer, **settings)
        k, v = (jnp.stack([jnp.zeros_like(part[name]), part[name]]) for name in "kv")
        return out, cache.write(past, {"all": Fresh(k, None if line.values == 0 else v)}, counts_B)

    stored = cache.make({"all": line}, 4, 32, jnp.float32, here)
    B, T = len(LENGTHS), max(LENGTHS)
    done_B, outputs = np.zeros(B, np.int32), np.zeros((B, T, inputs["q"].shape[2], inputs["v"].shape[-1]), np.float32)
    for piece in pieces:
        counts_B = np.minimum(np.asarray(piece, np.int32), LENGTHS - done_B)
        part = {name: np.full((B, max(piece), *x.shape[2:]), 50.0, np.float32) for name, x in inputs.items()}
        for b, (done, count) in enumerate(zip(done_B, counts_B, strict=True)):
            for name, x in inputs.items():
                part[name][b, :count] = x[b, done : done + count]
        out, stored = extend(stored, part, done_B, counts_B)
        for b, (done, count) in enumerate(zip(done_B, counts_B, strict=True)):
            outputs[b, done : done + count] = out[b, :count]
        done_B = done_B + counts_B
    assert (done_B == LENGTHS).all()
    return outputs


def random_inputs(heads: int, kv_heads: int, width: int, values: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    shapes = {"q": (heads, width), "k": (kv_heads, width), "v": (kv_heads, values)}
    arrays = {name: random.normal(size=(3, max(LENGTHS), *shape)) for name, shape in shapes.items()}
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def assert_pieces_equal_the_whole(line: Line, inputs: dict, pieces: list, devices: int = 1, **settings: Any) -> None:
    keys = ModelKeys(ici_tensor_parallelism=2, ici_fsdp_parallelism=1) if devices == 2 else ModelKeys()
    here = mesh.make(keys, jax.devices()[:devices])
    expected = attention(*inputs.values(), None, window=line.window, **settings)
    with mesh.use(here):
        actual = read_in_pieces(line, inputs, pieces, here, **settings)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(actual[b, :length], expected[b, :length], atol=1e-5)


PIECES = {
    "more than a ring, then one at a time": [[20, 5, 14], *[[1, 1, 1]] * 12],
    "uneven": [[5, 11, 0], [0, 5, 11], [11, 1, 1], [11, 0, 1], *[[1, 1, 1]] * 10],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", [None, 8])
def test_sinks_and_soft_caps(window: int | None, pieces: list[list[int]]) -> None:
    line = Line(layers=2, heads=2, width=8, values=12, window=window)
    sinks_N = jnp.asarray([-2.0, 0.0, 1.0, 4.0])
    assert_pieces_equal_the_whole(line, random_inputs(4, 2, 8, 12), pieces, softcap=1.5, sinks_N=sinks_N)


@pytest.mark.parametrize("devices", [1, 2])
def test_values_within_the_keys(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """As in multi-head latent attention: one key for all heads, whose first numbers are the value."""
    monkeypatch.setattr(cache, "BLOCK", 8)
    inputs = random_inputs(4, 1, 24, 16)
    inputs["v"] = inputs["k"][..., :16]
    line = Line(layers=2, heads=1, width=24, values=0)
    assert_pieces_equal_the_whole(line, inputs, PIECES["uneven"], devices, scale=0.3)


def test_a_stack_of_windows_and_whole_layers() -> None:
    """Each line of a mixed stack keeps its own tokens: those of a ring last ones, wherever the row began."""
    lines = {"local": Line(2, 1, 4, window=8), "whole": Line(1, 2, 4), "latent": Line(1, 1, 6, values=0)}
    here, lengths_B = mesh.make(ModelKeys(), jax.devices()[:1]), np.asarray([3, 0, 11])
    stored = cache.make(lines, 3, 32, jnp.float32, here)
    assert {name: line.k_LRKSH.shape[3] for name, line in stored.items()} == {"local": 8, "whole": 32, "latent": 32}
    assert stored["latent"].v_LRKSH is None
    past, counts_B = Past(stored, jnp.asarray(lengths_B)), np.asarray([20, 9, 2])
    positions_BT = lengths_B[:, None] + np.arange(20) + 1  # as what is kept: a position, counted from 1

    def fresh(line: Line) -> Fresh:
        shape = (line.layers, 3, 20, line.heads)
        tokens = np.broadcast_to(positions_BT[None, :, :, None, None], (*shape, 1))
        return Fresh(*(jnp.asarray(np.repeat(tokens, width, -1)) if width else None for width in line.widths))

    after = cache.write(past, {name: fresh(line) for name, line in lines.items()}, jnp.asarray(counts_B))
    for b, (length, count) in enumerate(zip(lengths_B, counts_B, strict=True)):
        written = range(length + 1, length + count + 1)
        for name, line in after.items():
            slots = line.k_LRKSH.shape[3]
            for layer in (line.k_LRKSH, *([] if line.v_LRKSH is None else [line.v_LRKSH])):
                expected = np.zeros(slots)
                for position in written[-slots:]:
                    expected[(position - 1) % slots] = position
                for kept in np.moveaxis(np.asarray(layer[:, b]), 2, -1).reshape(-1, slots):
                    assert kept.tolist() == expected.tolist(), (name, b)
    copied = cache.copy_rows(after, jnp.asarray([2, 0]), jnp.asarray([1, 0]), jnp.int32(1))
    for name in lines:
        for one, other in zip(jax.tree.leaves(copied[name]), jax.tree.leaves(after[name]), strict=True):
            assert (one[:, 1] == other[:, 2]).all()
            assert (one[:, [0, 2]] == other[:, [0, 2]]).all()


def test_memory_counts_values_once() -> None:
    mla, other = Line(3, 1, 576, values=0), Line(2, 4, 192, values=128)
    assert cache.row_bytes({"all": mla}, 256, jnp.bfloat16) == 3 * 256 * 576 * 2
    assert cache.row_bytes({"all": mla, "b": other}, 256, jnp.bfloat16) == 3 * 256 * 576 * 2 + 2 * 4 * 256 * 320 * 2
    stored = jax.eval_shape(lambda: other.empty(5, 256, jnp.bfloat16))
    assert stored.k_LRKSH.shape == (2, 5, 4, 256, 192)
    assert stored.v_LRKSH.shape == (2, 5, 4, 256, 128)


def test_one_head_is_split_over_no_device() -> None:
    here = mesh.make(ModelKeys(ici_data_parallelism=2, ici_tensor_parallelism=4))
    stored = cache.make({"mla": Line(2, 1, 24, values=0), "heads": Line(2, 4, 24)}, 4, 32, jnp.float32, here)
    assert stored["mla"].k_LRKSH.sharding.shard_shape((2, 4, 1, 32, 24)) == (2, 2, 1, 32, 24)
    assert stored["heads"].k_LRKSH.sharding.shard_shape((2, 4, 4, 32, 24)) == (2, 2, 1, 32, 24)

"""Reading a sequence piece by piece through the cache gives what one pass over the whole of it gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import cache, param
from luthier.model.attention import attention
from luthier.model.cache import KeysValues, Past
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.types import Batch

TOLERANCE = 1e-4
COMPUTE = Compute()


def whole_logp(model: Model, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    B, T = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = Batch(tokens_BT, positions_BT, np.ones_like(tokens_BT), np.ones_like(tokens_BT, bool))
    return np.asarray(jax.nn.log_softmax(jax.jit(lambda p, b: model.logits(p, b, COMPUTE))(params, batch)))


def pieces_logp(
    model: Model, params: Any, tokens_BT: np.ndarray, pieces: list[list[int]], rows_B: Any, empty: Any
) -> np.ndarray:
    """Return the log-probs at each token, with row b read by ``pieces[i][b]`` tokens at a time, padded to the most."""

    @jax.jit
    def extend(params: Any, stored: Any, tokens_BT: Any, lengths_B: Any, counts_B: Any) -> Any:
        past = Past(stored, lengths_B, rows_B)
        hidden_BTD, stored = model.extend(params, tokens_BT, past, counts_B, COMPUTE)
        return jax.nn.log_softmax(model.project(params, hidden_BTD)), stored

    B, T = tokens_BT.shape
    stored, done_B, logp_BTV = empty, np.zeros(B, np.int32), np.zeros((B, T, model.config.vocab_size), np.float32)
    for piece in pieces:
        counts_B = np.minimum(np.asarray(piece, np.int32), T - done_B)
        read_BT = np.full((B, max(piece)), 7, np.int32)
        for b in range(B):
            read_BT[b, : counts_B[b]] = tokens_BT[b, done_B[b] : done_B[b] + counts_B[b]]
        out_BTV, stored = extend(params, stored, read_BT, done_B, counts_B)
        for b in range(B):
            logp_BTV[b, done_B[b] : done_B[b] + counts_B[b]] = out_BTV[b, : counts_B[b]]
        done_B = done_B + counts_B
    assert (done_B == T).all()
    return logp_BTV


@pytest.mark.parametrize(
    ("name", "devices", "rows"),
    [*((name, 1, [3, 0, 4, 1]) for name in tiny.CONFIGS), ("llama3", 1, None), ("llama3", 8, [3, 0, 4, 1])],
)
def test_pieces_equal_the_whole(name: str, devices: int, rows: list[int] | None) -> None:
    model = Model.from_hf(tiny.CONFIGS[name], name)
    keys = ModelKeys(ici_data_parallelism=2, ici_tensor_parallelism=2) if devices == 8 else ModelKeys()
    here = mesh.make(keys, jax.devices()[:devices])
    with mesh.use(here):
        params = param.initialise(model.spec, jax.random.key(0), jnp.float32, here)
        tokens_BT = np.random.default_rng(0).integers(0, 256, (4, 24), dtype=np.int32)
        empty = cache.make(model.cache_lines, 5, 32, jnp.float32, here)
        pieces = [[5, 9, 0, 12], [3, 0, 12, 12], *[[1, 1, 1, 1]] * 24]
        actual = pieces_logp(model, params, tokens_BT, pieces, None if rows is None else jnp.asarray(rows), empty)
        np.testing.assert_allclose(actual, whole_logp(model, params, tokens_BT), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize("pieces", [(7, 1, 1, 5), (1,) * 14, (14,), (2, 12)])
def test_a_ring_holds_what_a_window_sees(window: int | None, pieces: tuple[int, ...]) -> None:
    """Sequences longer than the ring, read in pieces longer and shorter than it."""
    line = cache.Line(layers=2, heads=2, width=8, window=window)
    here = mesh.make(ModelKeys(), jax.devices()[:1])
    stored, T, layer = cache.make({"all": line}, 3, 16, jnp.float32, here), sum(pieces), 1
    assert stored["all"].k_LRKSH.shape == (2, 3, 2, window or 16, 8)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, T, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    rows_B, outputs, start = jnp.asarray([2, 0]), [], 0
    for length in pieces:
        past, part = Past(stored, jnp.full(2, start), rows_B), slice(start, start + length)
        here = past.layer("all", jnp.int32(layer))
        outputs.append(attention(q[:, part], k[:, part], v[:, part], None, window=window, past=here))
        fresh = cache.Fresh(jnp.stack([0 * k[:, part], k[:, part]]), jnp.stack([0 * v[:, part], v[:, part]]))
        stored = cache.write(past, {"all": fresh}, jnp.full(2, length))
        start += length
    expected = attention(q, k, v, None, window=window)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=1e-5, rtol=0)


def test_long_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 4)
    test_pieces_equal_the_whole("llama3", 1, [3, 0, 4, 1])


def test_rows_are_copied_in_order() -> None:
    rows = jnp.arange(4.0).reshape(1, 4, 1, 1, 1)
    copied = cache.copy_rows({"all": KeysValues(rows, -rows)}, jnp.asarray([2, 0, 3]), jnp.asarray([0, 1, 2]), 2)
    assert copied["all"].k_LRKSH.ravel().tolist() == [2, 2, 2, 3]
    assert copied["all"].v_LRKSH.ravel().tolist() == [-2, -2, -2, -3]


def test_memory_is_counted_by_rows() -> None:
    lines = {"all": cache.Line(3, 2, 8), "ring": cache.Line(1, 2, 8, window=10)}
    assert cache.row_bytes(lines, 100, jnp.bfloat16) == (3 * 100 + 10) * 2 * 8 * 2 * 2

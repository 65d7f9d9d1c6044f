"""The small layers against their plain forms under autodiff, and rematerialisation against none."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import TOLERANCE, assert_close

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import layers, param
from luthier.model.compute import Compute
from luthier.model.model import Model
from luthier.model.rope import Rope, inverse_frequencies
from tiny import TINY, make_batch


def plain_norm(x, scale_D):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale_D


def assert_equal(function, plain, arrays, dtype: str) -> None:
    """Compare values and gradients with those of ``plain`` in fp32; gradients have the types of the arrays."""
    arrays = [x.astype(dtype) if x.ndim > 1 else x for x in arrays]
    direction = jax.random.normal(jax.random.key(9), jax.eval_shape(function, *arrays).shape)

    def outcome(function, *arrays):
        loss = lambda *arrays: jnp.sum(function(*arrays).astype(jnp.float32) * direction)  # noqa: E731
        return function(*arrays), *jax.jit(jax.grad(loss, range(len(arrays))))(*arrays)

    ours = outcome(function, *arrays)
    assert [x.dtype for x in ours] == [arrays[0].dtype, *(x.dtype for x in arrays)]
    for one, other in zip(ours, outcome(plain, *(x.astype(jnp.float32) for x in arrays)), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    arrays = [jax.random.normal(keys[0], (3, 5, 16)), 1 + jax.random.normal(keys[1], (16,))]
    assert_equal(lambda x, scale_D: layers.rms_norm(x, scale_D, 1e-5), plain_norm, arrays, dtype)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str, dtype: str) -> None:
    arrays = [4 * jax.random.normal(key, (3, 5, 16)) for key in jax.random.split(jax.random.key(0))]
    plain = lambda gate, up: ACTIVATIONS[activation](gate) * up  # noqa: E731
    assert_equal(lambda gate, up: layers.gated(activation, gate, up), plain, arrays, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_in_a_shorter_type(activation: str) -> None:
    """What goes in is rounded for the gradient alone."""
    gate, up = (4 * jax.random.normal(key, (3, 5, 16)) for key in jax.random.split(jax.random.key(0)))
    short = lambda gate, up: layers.gated(activation, gate, up, jnp.bfloat16)  # noqa: E731
    np.testing.assert_array_equal(short(gate, up), layers.gated(activation, gate, up).astype(jnp.bfloat16))
    plain = lambda gate, up: ACTIVATIONS[activation](gate) * up  # noqa: E731
    slope = lambda function: jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), (0, 1))  # noqa: E731
    for one, other in zip(slope(short)(gate, up), slope(plain)(gate, up), strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, other, TOLERANCE["bfloat16"])


def test_softcap_bounds_what_is_large_and_keeps_what_is_small() -> None:
    x = jnp.array([-1e4, -0.01, 0.0, 0.01, 1e4])
    np.testing.assert_allclose(layers.softcap(x, 30.0), [-30, -0.01, 0, 0.01, 30], atol=1e-6)
    assert layers.softcap(x.astype(jnp.bfloat16), 30.0).dtype == jnp.bfloat16


def rope_by_complex_numbers(x_BTNH, positions_BT, rope: Rope, start: int = 0):
    """Rotate each pair as the real and the imaginary part of one number; the head is ``start`` numbers, then pairs."""
    head = x_BTNH.shape[-1] - start
    size = rope.rotary_dim(head)
    before, x_BTNR, after = jnp.split(x_BTNH, [start, start + size], axis=-1)
    turn = rope.table_factor * jnp.exp(1j * positions_BT[..., None] * inverse_frequencies(rope, head))[:, :, None]
    split = [x_BTNR[..., 0::2], x_BTNR[..., 1::2]] if rope.interleaved else jnp.split(x_BTNR, 2, axis=-1)
    z = (split[0] + 1j * split[1]) * turn
    if rope.interleaved:
        turned = jnp.stack([z.real, z.imag], axis=-1).reshape(x_BTNR.shape)
    else:
        turned = jnp.concatenate([z.real, z.imag], axis=-1)
    return jnp.concatenate([before, turned, after], axis=-1)


POSITIONS_BT = jnp.array([[0, 1, 2, 0, 1], [7, 8, 0, 1, 2]])
ROPES = {
    "plain": Rope(10.0),
    "interleaved": Rope(10.0, interleaved=True),
    "partial": Rope(10.0, partial_rotary_factor=0.5),
    "partial-interleaved": Rope(10.0, partial_rotary_factor=0.75, interleaved=True),
    "proportional": Rope(10.0, "proportional", partial_rotary_factor=0.5),
    "yarn": Rope(10.0, "yarn", factor=4.0, original_max_position_embeddings=8),
}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ROPES)
def test_apply_rope(name: str, platform: str, monkeypatch) -> None:
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    rope, arrays = ROPES[name], [jax.random.normal(jax.random.key(0), (2, 5, 3, 8))]
    rotation = layers.rope_tables(POSITIONS_BT, rope, 8)
    plain = lambda x: rope_by_complex_numbers(x, POSITIONS_BT, rope)  # noqa: E731
    for dtype in ("float32", "bfloat16"):
        assert_equal(lambda x: layers.apply_rope(x, rotation), plain, arrays, dtype)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["plain", "interleaved"])
def test_apply_rope_at_the_end_of_a_head(name: str, platform: str, monkeypatch) -> None:
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    rope, arrays = ROPES[name], [jax.random.normal(jax.random.key(0), (2, 5, 3, 14))]
    rotation = layers.rope_tables(POSITIONS_BT, rope, 8).at_the_end_of(14)
    plain = lambda x: rope_by_complex_numbers(x, POSITIONS_BT, rope, start=6)  # noqa: E731
    assert_equal(lambda x: layers.apply_rope(x, rotation), plain, arrays, "float32")


def test_long_factors_are_for_rows_that_go_beyond_the_original_length() -> None:
    factors = {"short_factor": (1.0, 1.5), "long_factor": (3.0, 4.0)}
    rope = Rope(10.0, "longrope", original_max_position_embeddings=8, **factors)
    positions_BT = jnp.array([[5, 6, 7], [6, 7, 8]])
    angles = jnp.array([[5, 6, 7], [6, 7, 8]])[..., None]
    rotation = layers.rope_tables(positions_BT, rope, 4)
    for row, long in ((0, False), (1, True)):
        frequencies = np.tile(inverse_frequencies(rope, 4, long=long), 2)
        np.testing.assert_allclose(rotation.cos_BTH[row], np.cos(angles[row] * frequencies), atol=1e-6)
        np.testing.assert_allclose(rotation.sin_BTH[row], np.sin(angles[row] * frequencies), atol=1e-6)


def gradient_of(policy: str, model: Model, params):
    batch = make_batch(rows=4, length=64)
    compute = Compute(remat=policy)
    loss = lambda params: jnp.sum(model.score(params, batch, compute).logp_BT * batch.mask_BT)  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params).compile()


def test_remat_changes_memory_and_no_gradient() -> None:
    model = Model.from_hf(TINY | {"num_hidden_layers": 12}, "tiny")
    params = param.initialise(model.spec, jax.random.key(0), jnp.float32, mesh.make(ModelKeys(), jax.devices()[:1]))
    compiled = {policy: gradient_of(policy, model, params) for policy in ("full", "dots", "none")}
    bytes_ = {policy: program.memory_analysis().temp_size_in_bytes for policy, program in compiled.items()}
    assert bytes_["full"] < bytes_["dots"] < bytes_["none"]
    gradients = {policy: program(params) for policy, program in compiled.items()}
    for policy in ("full", "dots"):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), gradients[policy], gradients["none"])


@pytest.mark.parametrize("devices", [1, 8])
def test_dots_saves_what_its_docstring_says(devices: int) -> None:
    """Per layer: its input, q, k, v, o and log-sum-exp, o's projection, gate and up; no copy of a weight."""
    model, batch = Model.from_hf(TINY, "tiny"), make_batch(rows=8, length=64)
    hidden = lambda params: model.hidden(params, batch, Compute(remat="dots"))  # noqa: E731
    with mesh.use(mesh.make(ModelKeys(ici_tensor_parallelism=min(devices, 2)), jax.devices()[:devices])) as here:
        params = param.abstract(model.spec, jnp.float32, here)
        _, backward = jax.eval_shape(lambda params: jax.vjp(hidden, params), params)
    stacked = [x for x in jax.tree.leaves(backward) if x.ndim > 2 and x.shape[0] == TINY["num_hidden_layers"]]
    weights = [x.shape for x in jax.tree.leaves(params["layers"])]
    activations = sorted(math.prod(x.shape) // (3 * 8 * 64) for x in stacked if x.shape not in weights)
    assert activations == sorted([64, 64, 32, 32, 64, 4, 64, 128, 128])
    assert len(stacked) - len(activations) <= len(weights)

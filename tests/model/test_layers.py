"""The small layers against their plain forms under autodiff, and rematerialisation against none."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from compare import TOLERANCE, assert_close

from luthier import mesh
from luthier.config import ModelKeys
from luthier.model import layers, param
from luthier.model.compute import Compute
from luthier.model.model import Model
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_silu_gate(dtype: str) -> None:
    arrays = [4 * jax.random.normal(key, (3, 5, 16)) for key in jax.random.split(jax.random.key(0))]
    assert_equal(layers.silu_gate, lambda gate, up: jax.nn.silu(gate) * up, arrays, dtype)


def rope_by_complex_numbers(x_BTNH, positions_BT, frequencies):
    """Rotate dimension i with i + H/2 as the real and the imaginary part of one number."""
    half = x_BTNH.shape[-1] // 2
    turn = jnp.exp(1j * positions_BT[..., None] * frequencies)[:, :, None]
    z = (x_BTNH[..., :half] + 1j * x_BTNH[..., half:]) * turn
    return jnp.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_rope(dtype: str) -> None:
    positions_BT, frequencies = jnp.array([[0, 1, 2, 0, 1], [7, 8, 0, 1, 2]]), 10.0 ** -jnp.arange(0.0, 4.0)
    tables = layers.rope_tables(positions_BT, frequencies)
    arrays = [jax.random.normal(jax.random.key(0), (2, 5, 3, 8))]
    plain = lambda x: rope_by_complex_numbers(x, positions_BT, frequencies)  # noqa: E731
    assert_equal(lambda x: layers.apply_rope(x, tables), plain, arrays, dtype)


def gradient_of(policy: str, model: Model, params):
    batch = make_batch(rows=4, length=64)
    compute = Compute(remat=policy)
    loss = lambda params: jnp.sum(model.score(params, batch, compute).logp_BT * batch.mask_BT)  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params).compile()


def test_remat_changes_memory_and_no_gradient() -> None:
    model = Model.from_hf(TINY | {"num_hidden_layers": 12}, "tiny")
    params = param.initialise(
        model.spec, jax.random.key(0), jnp.float32, jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    )
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
